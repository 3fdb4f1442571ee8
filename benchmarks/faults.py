"""What clients see while a fleet breaks: one scenario per fault, each with load, an event and promises to hold.

    python benchmarks/faults.py [SCENARIO ...] [--model FOLDER] [--backend cpu] [--json OUT] [--markdown OUT]

Without names all are run, one after another, each against an `mxn serve` of its own. `--backend fake` (the default)
scripts the time of a step and needs the model for its tokenizer only. `--scale 0.1` shortens durations and counts.
Exits 1 when a promise was broken.
"""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from fault_scenarios import clients, replicas, surroundings
from fault_scenarios.report import Check, Report, table
from fault_scenarios.setup import Setup

from mxn.bench.environment import manifest
from mxn.cli.prepare import DEFAULT_MODEL

SCENARIOS: dict[str, Callable[[Setup], Awaitable[Report]]] = {
    "kill": replicas.kill,
    "hang": replicas.hang,
    "saturation": replicas.saturation,
    "control": replicas.control,
    "chip": replicas.chip,
    "disconnects": clients.disconnects,
    "overload": clients.overload,
    "sigterm": surroundings.sigterm,
    "bad-yaml": surroundings.bad_yaml,
    "full-disk": surroundings.full_disk,
    "clock": surroundings.clock,
    "weights": replicas.weights,
    "slow-readers": clients.slow_readers,
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(SCENARIOS)}; all without.")] = None,
    model: Annotated[str, typer.Option(help="Model to serve, as `mxn serve` is told.")] = DEFAULT_MODEL,
    backend: Annotated[str, typer.Option(help="Backend of the replicas.")] = "fake",
    scale: Annotated[float, typer.Option(help="Share of the full durations and counts.", min=0.001, max=10)] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write findings to this file, or add them.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write a table to this file.")] = None,
) -> None:
    """Break a fleet and hold it to its promises."""
    unknown = set(names or ()) - SCENARIOS.keys()
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    setup = Setup(model=model, backend=backend, scale=scale)
    rows = _rows_in(json_path)
    for name in names or SCENARIOS:
        row = rows[name] = run(name, setup)
        print(table([row]).split("\n", 2)[2], end="", flush=True)
        print(json.dumps({"figures": row["figures"], "notes": row["notes"]}, indent=1), flush=True)
        known = [rows[one] for one in SCENARIOS if one in rows]
        if json_path:
            json_path.write_text(
                json.dumps({"manifest": asdict(manifest(seed=0)), "scenarios": known}, indent=1) + "\n"
            )
        if markdown_path:
            markdown_path.write_text(table(known))
    if not all(rows[name]["is_kept"] for name in names or SCENARIOS):
        raise typer.Exit(1)


def _rows_in(path: Path | None) -> dict[str, dict[str, Any]]:
    """Findings of scenarios that were run before, by name; a scenario that is run again replaces its own."""
    if path is None or not path.exists():
        return {}
    return {row["scenario"]: row for row in json.loads(path.read_text())["scenarios"]}


def run(name: str, setup: Setup) -> dict[str, Any]:
    """One scenario's record. A scenario that fails itself is a broken promise, with its cause in the notes."""
    scenario = SCENARIOS[name]
    began_s = time.monotonic()
    try:
        report = asyncio.run(scenario(setup))  # type: ignore[arg-type]
    except Exception as error:
        report = Report(notes=[traceback.format_exc(limit=-3)])
        report.checks.append(
            Check(name="the scenario could be run", value=f"{type(error).__name__}", promise="yes", is_kept=False)
        )
    return {
        "scenario": name,
        "backend": setup.backend,
        "scale": setup.scale,
        "fault": (scenario.__doc__ or "").strip(),
        "seconds": round(time.monotonic() - began_s, 1),
        "is_kept": report.is_kept,
        **asdict(report),
    }


if __name__ == "__main__":
    typer.run(main)
