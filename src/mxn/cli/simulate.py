"""`mxn simulate`: replays a trace through plan and router on simulated chips. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mxn.fleet.simulate import SimulatedDeployment, Simulation


def simulate(
    file: Annotated[Path, typer.Argument(metavar="mxn.yaml", help="The file with cluster, policy and deployments.")],
    traces: Annotated[
        list[str],
        typer.Option(
            "--trace",
            metavar="[NAME=]FILE",
            help="An Azure (.csv) or Mooncake (.jsonl) trace for one deployment; without a name it is dealt out among "
            "the others by their planned load. Repeatable.",
        ),
    ],
    what_if: Annotated[
        str, typer.Option("--what-if", metavar="CHIPS", help='Chips to add and take away: "+2 mi300x,-1 h100-sxm".')
    ] = "",
    limit_s: Annotated[float, typer.Option("--limit-s", min=1, help="Seconds of the trace to replay.")] = 3600.0,
    rate_scale: Annotated[float, typer.Option("--rate-scale", min=0.001, help="Times the trace's rate.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Deals a trace out among deployments.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay a trace through plan and router on simulated chips.

    Times come from the cost model, everything else is the product's own: step scheduler, cache, router.
    Says what share of the requests keep their limits, tokens per second, and watts; the same for the same seed.
    """
    from mxn.cli.console import show_json
    from mxn.config.datasets import load_dataset
    from mxn.config.deployments import load_deployments
    from mxn.errors import ConfigError
    from mxn.fleet.plan import solve_plan
    from mxn.fleet.simulate import simulate as replay

    solved = solve_plan(load_deployments(file), what_if=what_if)
    asks = {}
    for word in traces:
        name, is_named, path = word.partition("=")
        name, path = (name, path) if is_named else ("", word)
        if name in asks:
            raise ConfigError(f"--trace: {name or 'a trace without a name'} is given twice")
        asks[name] = load_dataset(Path(path)).asks
    found = replay(solved, asks, seed=seed, limit_s=limit_s, rate_scale=rate_scale)
    if json_output:
        show_json(found)
    else:
        print("\n".join(_lines(found)))


def _lines(found: Simulation) -> Iterator[str]:
    yield f"# {found.calibration}"
    watts = "unknown watts" if found.watts is None else f"{found.watts:.0f} W"
    per_watt = "" if found.tokens_per_watt is None else f"; {found.tokens_per_watt:.3g} tokens per watt"
    yield (
        f"{found.seconds:.0f} s simulated; {found.output_tokens_per_s:.0f} output tokens/s, "
        f"{found.prompt_tokens_per_s:.0f} prompt tokens/s; {watts}{per_watt}"
    )
    yield ""
    header = ("deployment", "replicas", "requests", "served", "within SLO", "TTFT ms p50/p95/p99", "TPOT ms p50/p95")
    rows = [(*header, "busy"), *(_row(one) for one in found.deployments)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    for one in found.deployments:
        if one.refused:
            yield f"{one.name}: {one.refused} requests are longer than its context"
        if one.lost:
            yield f"{one.name}: {one.lost} requests found no replica"


def _row(one: SimulatedDeployment) -> tuple[str, ...]:
    attained = "no limits" if one.slo_attained is None else f"{one.slo_attained:.1%}"
    ttfts, tpots = (one.ttft_p50_s, one.ttft_p95_s, one.ttft_p99_s), (one.tpot_p50_s, one.tpot_p95_s)
    return (
        *(one.name, str(one.replicas), str(one.requests), str(one.served), attained),
        " / ".join("-" if value is None else f"{1e3 * value:.0f}" for value in ttfts),
        " / ".join("-" if value is None else f"{1e3 * value:.1f}" for value in tpots),
        f"{one.utilisation:.0%}",
    )
