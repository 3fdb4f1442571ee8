"""A plan as one self-contained HTML page: the matrix of deployments and chip kinds, placements, reasons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from mxn.bench.page import STYLE
from mxn.fleet.plan import Plan, PlannedDeployment, Yield

_OWN_STYLE = "table.matrix { table-layout: fixed } details { margin: 4px 0 } summary { cursor: pointer }"
_DEFINITIONS = (
    ("tokens per watt", "output tokens/s for each watt of a busy replica, as predicted; the same as tokens per joule"),
    ("shade", "against the best chip kind of the same deployment"),
    ("gap", "between this plan and a proven bound: no plan of the problem as posed is better by more"),
    ("uncalibrated", "out of data sheets and assumed shares of their rates; may be off by half or more"),
    ("measured, scaled", "fitted to what `mxn calibrate` timed: with this model, or with others on the same chip"),
)


def plan_page(plan: Plan, *, title: str = "Plan") -> str:
    """The page."""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(plan.calibration)}.</p>',
        _tiles(plan),
        "<h2>Deployments × chip kinds</h2>",
        '<p class="note">Predicted tokens per watt of the best cell of each kind, chosen or not.</p>',
        _matrix(plan),
        "<h2>Placements</h2>",
        _placements(plan),
        "<h2>Chips</h2>",
        _chips(plan),
        *_unserved(plan.deployments),
        "<h2>Why not elsewhere</h2>",
        *(_reasons(deployment) for deployment in plan.deployments),
        *_prices(plan),
        "<h2>What the words mean</h2>",
        "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in _DEFINITIONS) + "</dl>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text()}{_OWN_STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _tiles(plan: Plan) -> str:
    served = sum(not (d.unserved or d.missing_replicas) for d in plan.deployments)
    replicas = sum(p.replicas for d in plan.deployments for p in d.placements)
    tiles = [
        (f"{served} of {len(plan.deployments)}", "deployments are served whole"),
        ("?" if plan.watts is None else f"{_number(plan.watts)} W", "of all replicas at their load"),
        (str(replicas), f"replicas; objective {', '.join(plan.objective)}"),
        ("0 %" if plan.gap < 5e-7 else f"{100 * plan.gap:.2g} %", f"proven gap, {plan.effort} effort"),
    ]
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _matrix(plan: Plan) -> str:
    """Deployments as rows, chip kinds as columns."""
    kinds = list(plan.chips_there)
    head = "".join(f'<th scope="col">{escape(kind)}</th>' for kind in kinds)
    rows = []
    for deployment in plan.deployments:
        found = {best.kind: best for best in deployment.yields}
        most = max((_efficiency(best) for best in found.values()), default=0.0)
        cells = [
            _cell(deployment, found[kind], most) if kind in found else _refused(deployment, kind) for kind in kinds
        ]
        rows.append(f'<tr><th scope="row">{escape(deployment.name)}</th>{"".join(cells)}</tr>')
    return f'<div class="scroll"><table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _cell(deployment: PlannedDeployment, best: Yield, most: float) -> str:
    share = _efficiency(best) / most if most else 0.0
    count = sum(placement.replicas for placement in deployment.placements if placement.kind == best.kind)
    tag = f' <span class="tag">{count} placed on this kind</span>' if count else ""
    amount = "?" if best.tokens_per_watt is None else _number(best.tokens_per_watt)
    watts = "unknown watts" if best.watts is None else f"{_number(best.watts)} W"
    return (
        f'<td class="heat" style="--share: {0.08 + 0.5 * share:.2f}"><b>{amount}</b>'
        f"<small>{escape(best.cell.partition(' ')[2])}{tag}</small>"
        f"<small>{_number(best.output_tokens_per_s)} tok/s, {watts}</small></td>"
    )


def _refused(deployment: PlannedDeployment, kind: str) -> str:
    reasons = [no for no in deployment.rejections if no.kind == kind]
    text = f"{reasons[0].constraint}: {reasons[0].reason}" if reasons else "not reached"
    return f'<td class="empty">{escape(text)}</td>'


def _placements(plan: Plan) -> str:
    rows = []
    for deployment in plan.deployments:
        if not deployment.placements:
            rows.append((deployment.name, "0", "nowhere", *([""] * 8)))
        for placed in deployment.placements:
            rows.append(
                (
                    *(deployment.name, str(placed.replicas), f"{placed.pool} ×{placed.chips_per_replica:g}"),
                    f"{placed.backend} {placed.quantisation}",
                    f"{placed.memory_gib:.1f} of {placed.memory_available_gib:.1f}",
                    *(f"{placed.ttft_ms:.0f}", f"{placed.tpot_ms:.1f}", f"{placed.requests_per_s:.3g}"),
                    "?" if placed.watts is None else f"{placed.watts:.0f}",
                    placed.limited_by,
                    placed.calibration,
                )
            )
    head = ("deployment", "replicas", "where", "through", "GiB per chip", "TTFT ms", "TPOT ms", "req/s", "W")
    return _table((*head, "limited by", "times"), rows, numbers={1, 4, 5, 6, 7, 8})


def _chips(plan: Plan) -> str:
    rows = [(kind, f"{plan.chips_used[kind]:g}", str(there)) for kind, there in plan.chips_there.items()]
    return _table(("kind", "used", "there"), rows, numbers={1, 2})


def _unserved(deployments: Sequence[PlannedDeployment]) -> Iterable[str]:
    lacking = [deployment for deployment in deployments if deployment.unserved or deployment.missing_replicas]
    if lacking:
        yield "<h2>What is not served</h2>"
    for deployment in lacking:
        text = f"{deployment.unserved:.0%} of its load" if deployment.unserved else ""
        missing = f"{deployment.missing_replicas} replicas short of its minimum" if deployment.missing_replicas else ""
        what = " and ".join(filter(None, (text, missing)))
        yield f'<h3 class="bad">{escape(deployment.name)}: {escape(what)}</h3><p>Each of these would do:</p>'
        yield "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in deployment.relaxations) + "</ul>"


def _reasons(deployment: PlannedDeployment) -> str:
    rows = [
        (
            no.kind,
            " ".join(word for word in (no.backend, no.quantisation) if word != "any") + f" ×{no.chips:g}",
            no.constraint,
            no.reason,
            "" if no.margin is None else f"{no.margin:.3g} {no.unit}",
        )
        for no in deployment.rejections
    ]
    up = deployment.runner_up
    runner = "" if up is None else f"; runner-up {up.cell} in {up.pool}, {up.cost_above:+.1%} in the objective"
    summary = f"{deployment.name}: {len(rows)} cells refused{runner}"
    table = _table(("kind", "cell", "constraint", "reason", "misses by"), rows, numbers={4}) if rows else ""
    return f"<details><summary>{escape(summary)}</summary>{table}</details>"


def _prices(plan: Plan) -> Iterable[str]:
    if plan.prices:
        yield "<h2>What more would bring</h2>"
        rows = [(price.of, f"{price.amount:.3g} {price.unit}") for price in plan.prices]
        yield _table(("", "saves"), rows, numbers={1})


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: set[int]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f'<{tag} class="number">{escape(cell)}</{tag}>' if index in numbers else f"<{tag}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(head, "th")}{body}</table></div>'


def _efficiency(best: Yield) -> float:
    return best.tokens_per_watt or 0.0


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
