"""One self-contained HTML page of benchmark records: matrix, frontiers, power over time, tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mxn.bench.records import ALL, Manifest, Record, Report, Skipped
from mxn.bench.report import Cell, Grid, cells, compared_groups, comparison, details, figure, matrix, number_text
from mxn.bench.svg import Series, chart
from mxn.core.quantity import Provenance, Quantity

STYLE = Path(__file__).with_name("page.css")
MAX_POWER_LINES = 8

_DEFINITIONS = (
    ("tokens per watt", "(output tokens/s) / W = output tokens per joule; total energy of the window, idle included"),
    ("total tokens per joule", "(prompt + output tokens) / joules; many times larger on long prompts"),
    ("TTFT", "request sent to first output"),
    ("TPOT", "(last output − first output) / (output tokens − 1)"),
    ("1 stream", "1 / median TPOT of a single request at a time"),
    ("measured", "read from a hardware counter or an external meter"),
    ("sampled", "watts read many times a second and integrated"),
    ("estimated", "modelled from utilisation, often within a factor of two: ranks settings on one machine, not chips"),
    ("simulated", "a scripted chip or a replayed trace"),
)


def page(reports: Sequence[Report], *, title: str = "Tokens per watt") -> str:
    """The page for one or more reports."""
    records = [record for report in reports for record in report.records]
    skipped = [skip for report in reports for skip in report.skipped]
    chips = list(dict.fromkeys(f"{r.manifest.chip}, {r.manifest.num_cores} cores" for r in reports))
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape("; ".join(chips))}. Measured {escape(_dates(reports))}.</p>',
        _tiles(records, skipped),
        "<h2>Models × backends</h2>",
        _matrix(records, [skip for skip in skipped if ALL not in (skip.model, skip.backend)]),
        *_skipped_list([skip for skip in skipped if ALL in (skip.model, skip.backend)]),
        *_notes(matrix(records).notes),
        "<h2>Frontiers</h2>",
        '<p class="note">A point is a load; a line joins loads of equal requests. Hover for figures.</p>',
        '<div class="charts">',
        _frontier(records, "tpot_ms", "Throughput against latency", "time per output token, ms (median)"),
        _frontier(records, "tokens_per_watt", "Throughput against efficiency", "output tokens per joule"),
        "</div>",
        "<h2>Power over time</h2>",
        _power(records),
        "<h2>Workloads</h2>",
    ]
    took_turns = len(reports) == 1 and reports[0].took_turns
    for models, group in compared_groups(reports):
        grid = comparison(group, took_turns=took_turns)
        body += [f"<h3>{escape(models)}</h3>", _table(grid), *_notes(grid.notes)]
    body += ["<h2>Details</h2>", _table(details(records)), *_notes(_idle_notes(records))]
    body += ["<h2>What the words mean</h2>", _pairs(_DEFINITIONS)]
    for report in reports:
        body += ["<h2>How it was measured</h2>", _pairs(_manifest_pairs(report.manifest))]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text()}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


# ---------------------------------------------------------------- tiles and matrix


def _tiles(records: Sequence[Record], skipped: Sequence[Skipped]) -> str:
    good = [record for record in records if record.is_result]
    tiles = []
    efficient = [r for r in good if r.tokens_per_watt.value is not None]
    if efficient:
        best = max(efficient, key=lambda r: r.tokens_per_watt.value or 0.0)
        what = f"tokens per watt at best, {best.tokens_per_watt.provenance}: {_where(best)}"
        tiles.append((number_text(best.tokens_per_watt.value or 0.0), what))
    else:
        tiles.append(("-", "tokens per watt: nothing meters the power here"))
    fast = [r for r in good if "output_tokens_per_s" in r.metrics]
    if fast:
        best = max(fast, key=lambda r: r.metrics["output_tokens_per_s"].median)
        speed = best.metrics["output_tokens_per_s"].median
        tiles.append((number_text(speed), f"output tokens/s at best: {_where(best)}"))
    num_cells = len(cells(good))
    tiles.append((str(num_cells), f"cells measured, {len(skipped)} skipped with a reason"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles)
        + "</div>"
    )


def _matrix(records: Sequence[Record], skipped: Sequence[Skipped]) -> str:
    """Models as rows, backend and quantisation as columns; the shade is tokens per watt against the row's best."""
    found = {(c.main.subject.model, _column(c.main)): c for c in cells(records)}
    missing = {(s.model, f"{s.backend} {s.quantisation}"): s for s in skipped}
    keys = [*found, *missing]
    models = list(dict.fromkeys(model for model, _ in keys))
    columns = list(dict.fromkeys(column for _, column in keys))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    rows = []
    for model in models:
        own = [found[model, column] for column in columns if (model, column) in found]
        best = max((_efficiency(cell) for cell in own), default=0.0)
        parts = [f'<th scope="row">{escape(model)}</th>']
        for column in columns:
            cell, skip = found.get((model, column)), missing.get((model, column))
            if cell is not None:
                parts.append(_cell(cell, best))
            else:
                parts.append(f'<td class="empty">{escape(skip.reason if skip else "not part of this run")}</td>')
        rows.append(f"<tr>{''.join(parts)}</tr>")
    return f'<div class="scroll"><table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _skipped_list(skipped: Sequence[Skipped]) -> list[str]:
    """What was left out before there were cells: backends that are absent, models that are not here."""
    if not skipped:
        return []
    names = [s.model if s.backend == ALL else s.backend for s in skipped]
    items = [f"<li>{escape(name)}: {escape(s.reason)}</li>" for name, s in zip(names, skipped, strict=True)]
    return [f'<div class="note">Left out:<ul>{"".join(items)}</ul></div>']


def _cell(cell: Cell, best: float) -> str:
    main = cell.main
    if not main.is_result:
        why = main.faults[0] if main.faults else main.quality.note if main.quality else "nothing was answered"
        return f'<td class="bad"><b>no result</b><small>{escape(why)}</small></td>'
    share = 0.08 + 0.4 * (_efficiency(cell) / best) if best else 0.0
    value = main.tokens_per_watt.value
    speed = main.metrics.get("output_tokens_per_s")
    lines = [f"{figure(speed)} tok/s at {main.workload.concurrency or main.workload.arrival} at once"]
    if cell.one is not None:
        lines.append(
            f"{figure(cell.one.metrics.get('decode_tokens_per_s'))} tok/s one stream, "
            f"TTFT {figure(cell.one.metrics.get('ttft_ms'))} ms"
        )
    lines.append(f"{_watts(main.mean_watts)}, {main.scope}")
    return (
        f'<td class="heat" style="--share: {share:.2f}"><b>{number_text(value) if value is not None else "-"} tok/W</b>'
        + "".join(f"<small>{escape(line)}</small>" for line in lines)
        + f'<small><span class="tag">{main.mean_watts.provenance}</span></small></td>'
    )


def _column(record: Record) -> str:
    subject = record.subject
    return subject.label if subject.backend == "unknown" else f"{subject.backend} {subject.quantisation}"


def _efficiency(cell: Cell) -> float:
    return (cell.main.tokens_per_watt.value or 0.0) if cell.main.is_result else 0.0


# ---------------------------------------------------------------- charts


def _frontier(records: Sequence[Record], metric: str, title: str, y_title: str) -> str:
    good = [r for r in records if r.is_result and "output_tokens_per_s" in r.metrics]
    subjects = dict.fromkeys((r.subject.model, _column(r)) for r in good)
    has_models = len({model for model, _ in subjects}) > 1
    series = []
    for model, column in subjects:
        own = [r for r in good if (r.subject.model, _column(r)) == (model, column)]
        points: list[tuple[float, float | None, str]] = []
        for lengths in dict.fromkeys(map(_lengths, own)):  # a line joins loads of the same requests only
            alike = [r for r in own if _lengths(r) == lengths]
            points += [_point(r, metric) for r in sorted(alike, key=_speed)]
            points.append((0.0, None, ""))
        if any(y is not None for _, y, _ in points):
            series.append(Series(name=f"{model}, {column}" if has_models else column, points=tuple(points)))
    return f"<div><h3>{escape(title)}</h3>{chart(series, x_title='output tokens/s', y_title=y_title)}</div>"


def _point(record: Record, metric: str) -> tuple[float, float | None, str]:
    if metric == "tokens_per_watt":
        y = record.tokens_per_watt.value
    else:
        spread = record.metrics.get(metric)
        y = None if spread is None else spread.median
    shown = "-" if y is None else number_text(y)
    return _speed(record), y, f"{record.workload.title}: {number_text(_speed(record))} tok/s, {shown}"


def _speed(record: Record) -> float:
    return record.metrics["output_tokens_per_s"].median


def _lengths(record: Record) -> tuple[int, int, str]:
    return record.workload.prompt_tokens, record.workload.output_tokens, record.workload.dataset


def _power(records: Sequence[Record]) -> str:
    drawn = [r for r in records if len([w for _, w in r.power if w is not None]) > 1]
    longest = sorted(drawn, key=lambda r: r.power[-1][0], reverse=True)[:MAX_POWER_LINES]
    series = [
        Series(
            name=f"{_where(record)} ({record.mean_watts.provenance})",
            points=tuple((at_s, watts, "") for at_s, watts in record.power),
            has_dots=False,
        )
        for record in drawn
        if record in longest
    ]
    left_out = len(drawn) - len(series)
    note = f'<p class="note">The {MAX_POWER_LINES} longest of {len(drawn)} runs.</p>' if left_out else ""
    return f'<div class="wide">{chart(series, x_title="seconds", y_title="watts", width=1100)}{note}</div>'


# ---------------------------------------------------------------- tables and text


def _table(grid: Grid) -> str:
    is_number = [
        all(row[i] == "-" or row[i][:1].isdigit() for row in grid.rows) and i > 0 for i in range(len(grid.columns))
    ]
    kinds = [' class="number"' if number else "" for number in is_number]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, grid.columns, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>"
        for row in grid.rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _notes(notes: Sequence[str]) -> list[str]:
    return [f'<p class="note">{escape(note)}</p>' for note in notes]


def _idle_notes(records: Sequence[Record]) -> list[str]:
    texts = [
        f"{r.subject.label}: {_watts(r.idle_before_w)} before, {_watts(r.idle_after_w)} after"
        for r in records
        if r.idle_before_w is not None and r.idle_after_w is not None
    ]
    return [f"Idle power: {'; '.join(dict.fromkeys(texts))}."] if texts else []


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs) + "</dl>"


def _manifest_pairs(manifest: Manifest) -> list[tuple[str, str]]:
    limits = [f"{limit:g} W" for limit in manifest.power_limits_w if limit is not None]
    return [
        ("started", manifest.started),
        ("chip", f"{manifest.chip}, {manifest.num_cores} cores, {manifest.memory_gib} GiB"),
        ("features", " ".join(manifest.chip_features)),
        ("power limit", ", ".join(limits) or "unknown"),
        *(("power", text) for text in manifest.power_sources),
        ("load before", f"{manifest.load_average} (processes that wanted a core)"),
        ("platform", manifest.platform),
        ("versions", ", ".join(f"{name} {number}" for name, number in manifest.versions.items())),
        ("drivers", ", ".join(f"{name} {number}" for name, number in manifest.drivers.items()) or "not told"),
        ("commit", manifest.commit),
        ("command", manifest.command),
        ("seed", str(manifest.seed)),
    ]


def _where(record: Record) -> str:
    return f"{record.subject.model}, {_column(record)}, {record.workload.name}"


def _watts(watts: Quantity | None) -> str:
    if watts is None or watts.value is None:
        return "watts unknown"
    about = "about " if watts.provenance is Provenance.ESTIMATED else ""
    return f"{about}{number_text(watts.value)} W"


def _dates(reports: Sequence[Report]) -> str:
    return ", ".join(dict.fromkeys(report.manifest.started[:10] for report in reports))
