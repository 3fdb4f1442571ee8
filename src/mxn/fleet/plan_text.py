"""A plan as lines for a terminal."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from mxn.fleet.plan import Placement, Plan, PlannedDeployment, Yield

_SEATS_SHOWN = 6


def plan_lines(plan: Plan, *, explain: bool = False) -> Iterator[str]:
    """The plan; with `explain`, the runner-up and the reasons for every refusal."""
    yield f"# {plan.calibration}"
    watts = "unknown watts" if plan.watts is None else f"{plan.watts:.0f} W"
    state = "everything is served" if plan.is_complete else "NOT everything is served"
    yield f"{state}; {watts}; objective {', '.join(plan.objective)}; {plan.effort}; gap {_per_cent(plan.gap)}"
    yield from (f"note: {note}" for note in plan.notes)
    yield ""
    header = ("deployment", "replicas", "where", "through", "GiB/chip", "TTFT ms", "TPOT ms", "req/s", "tok/s")
    rows: list[tuple[str, ...]] = [(*header, "W", "tok/s/W")]
    for deployment in plan.deployments:
        rows += [_row(deployment.name, placement) for placement in deployment.placements]
        if not deployment.placements:
            rows.append((deployment.name, "0", "nowhere", *([""] * 8)))
    yield from _table(rows)
    for deployment in plan.deployments:
        yield from _lacks(deployment)
    if explain:
        for deployment in plan.deployments:
            yield ""
            yield from _reasons(deployment)
        yield ""
        yield from _matrix(plan)
    yield ""
    yield "chips used: " + ", ".join(
        f"{kind} {plan.chips_used[kind]:g} of {there}" for kind, there in plan.chips_there.items()
    )
    for stage in plan.stages:
        yield f"{stage.name}: {stage.value:.1f}, no plan below {stage.bound:.1f} (gap {_per_cent(stage.gap)})"
    for price in plan.prices:
        yield f"{price.of} saves {price.amount:.3g} {price.unit}"


def _row(name: str, placement: Placement) -> tuple[str, ...]:
    size = placement.chips_per_replica
    chips = f"{size:g}" if size >= 1 else f"1/{round(1 / size)}"
    return (
        name,
        str(placement.replicas),
        f"{placement.pool} x{chips}",
        f"{placement.backend} {placement.quantisation}",
        f"{placement.memory_gib:.1f} of {placement.memory_available_gib:.1f}",
        f"{placement.ttft_ms:.0f}",
        f"{placement.tpot_ms:.1f}",
        f"{placement.requests_per_s:.3g}",
        f"{placement.output_tokens_per_s:.0f}",
        "?" if placement.watts is None else f"{placement.watts:.0f}",
        "?" if placement.tokens_per_watt is None else f"{placement.tokens_per_watt:.3g}",
    )


def _lacks(deployment: PlannedDeployment) -> Iterator[str]:
    if not deployment.unserved and not deployment.missing_replicas:
        return
    yield ""
    if deployment.unserved:
        share, rate = deployment.unserved, deployment.unserved * deployment.requests_per_s
        yield f"{deployment.name} (tier {deployment.tier}): {share:.0%} of its load unserved, {rate:.3g} requests/s"
    if deployment.missing_replicas:
        yield f"{deployment.name} (tier {deployment.tier}): {deployment.missing_replicas} replicas short of its minimum"
    yield "  each of these would do:"
    yield from (f"    {text}" for text in deployment.relaxations)


def _reasons(deployment: PlannedDeployment) -> Iterator[str]:
    yield f"{deployment.name} ({deployment.model}, tier {deployment.tier}, {deployment.requests_per_s:g} requests/s)"
    for placement in deployment.placements:
        yield (
            f"  chosen: {placement.replicas} x {placement.pool} {placement.backend} {placement.quantisation}, "
            f"{placement.batch} sequences at once, limited by {placement.limited_by}, loads in {placement.load_s:.0f} s"
        )
        yield f"    times {placement.calibration}"
        more = len(placement.seats) - _SEATS_SHOWN
        yield f"    on {', '.join(placement.seats[:_SEATS_SHOWN])}" + (f" and {more} more" if more > 0 else "")
    if deployment.runner_up is not None:
        up = deployment.runner_up
        yield f"  runner-up: {up.cell} in {up.pool}, {up.cost_above:+.1%} in the objective"
    for no in deployment.rejections:
        size = f" x{no.chips:g}" if no.backend != "any" else ""
        cell = " ".join(word for word in (no.backend, no.quantisation) if word != "any")
        margin = "" if no.margin is None else f" [misses by {no.margin:.3g} {no.unit}]"
        yield f"  refused: {no.kind}{size}{' ' + cell if cell else ''}: {no.constraint}: {no.reason}{margin}"


def _matrix(plan: Plan) -> Iterator[str]:
    """Models by chip kinds: output tokens per joule of the best cell, whether it was chosen or not."""
    kinds = list(plan.chips_there)
    yield "tokens per watt of the best cell"
    rows: list[tuple[str, ...]] = [("", *kinds)]
    for deployment in plan.deployments:
        found = {best.kind: best for best in deployment.yields}
        cells = [_cell(found[kind]) if kind in found else "-" for kind in kinds]
        rows.append((deployment.name, *cells))
    yield from _table(rows, left=range(len(kinds) + 1))


def _cell(best: Yield) -> str:
    amount = "?" if best.tokens_per_watt is None else f"{best.tokens_per_watt:.3g}"
    return f"{amount} ({best.cell.partition(' ')[2]})"


def _table(rows: Sequence[tuple[str, ...]], left: Container[int] = (0, 2, 3)) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _per_cent(share: float) -> str:
    return "0 %" if share < 5e-7 else f"{100 * share:.2g} %"
