"""Tables of records, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxn.bench.comparison import mismatches
from mxn.bench.metrics import Spread
from mxn.bench.records import NO_STEADY_PART, Manifest, Record, Report
from mxn.bench.statistics import ratio_interval
from mxn.bench.workloads import Workload
from mxn.core.quantity import Provenance, Quantity

if TYPE_CHECKING:
    from rich.table import Table

_TEXT_COLUMNS = ("Model", "Backend", "Quantisation", "Workload", "Figure", "Arm", "Power", "Why")
_WRAPPED_COLUMNS = ("Backend", "Why")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table before it is drawn. `notes` stand below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What was measured of one subject: one stream, the fastest batch, and the one of them whose energy is shown."""

    one: Record | None
    batch: Record | None
    main: Record


def cells(records: Sequence[Record]) -> list[Cell]:
    """One cell per subject, in order."""
    found = []
    for key in dict.fromkeys((r.subject.model, r.subject.label) for r in records):
        own = [r for r in records if (r.subject.model, r.subject.label) == key]
        one = next((r for r in own if _is_one_stream(r.workload)), None)
        batches = [r for r in own if r.workload.headline == "output_tokens_per_s" and r is not one]
        batch = max(batches, key=lambda r: (r.is_result, r.headline.median if r.headline else 0.0), default=None)
        found.append(Cell(one=one, batch=batch, main=batch or one or own[0]))
    return found


def _is_one_stream(workload: Workload) -> bool:
    return workload.headline == "decode_tokens_per_s" or (
        workload.headline == "output_tokens_per_s" and workload.concurrency == 1
    )


def matrix(records: Sequence[Record]) -> Grid:
    """Model x backend: speed of one stream, TTFT, speed of a batch, watts with provenance and tokens per watt.

    Watts and tokens per watt belong to the batch when one was run, else to the stream.
    """
    rows = []
    sources: dict[str, None] = {}  # ordered sets
    interfaces: dict[str, None] = {}
    at_once: set[str] = set()
    for cell in cells(records):
        one, batch, main = cell.one, cell.batch, cell.main
        if batch:
            at_once.add(f"{batch.workload.concurrency} at once" if batch.workload.concurrency else "Open loop")
        subject, watts = main.subject, main.mean_watts
        sources[_power_text(watts)] = None
        interfaces[subject.interface] = None
        rows.append(
            (
                subject.model,
                subject.label if subject.backend == "unknown" else f"{subject.backend} {subject.quantisation}",
                figure(one.metrics.get("decode_tokens_per_s")) if one else "-",
                figure((one or main).metrics.get("ttft_ms")),
                figure(batch.headline) if batch else "-",
                number_text(watts.value) if watts.value is not None else "-",
                number_text(main.tokens_per_watt.value) if main.tokens_per_watt.value is not None else "-",
                str(watts.provenance) if main.is_result else "NO RESULT",
            )
        )
    batch_title = at_once.pop() if len(at_once) == 1 else "Batch"
    return Grid(
        title="Model x backend",
        columns=(
            "Model",
            "Backend",
            "1 stream tok/s",
            "TTFT ms",
            f"{batch_title} tok/s",
            "Watts",
            "Tokens per watt",
            "Power",
        ),
        rows=tuple(rows),
        notes=(
            f"Interface: {', '.join(interfaces)}. Tokens per watt = (output tokens/s) / W = output tokens per joule, "
            "idle power included.",
            *sources,
            *_fault_notes(records),
            *_mismatch_notes([cell.main for cell in cells(records)]),
        ),
    )


def comparison(records: Sequence[Record], *, took_turns: bool = True) -> Grid:
    """Workload by workload the headline of every arm, and its ratio to the first arm (above 1 is better).

    took_turns: the arms met the same conditions in each repetition; else ratios are of runs made one after another.
    """
    labels = list(dict.fromkeys(r.subject.label for r in records))
    found = {(r.subject.label, r.workload.name): r for r in records}
    rows = []
    for name in dict.fromkeys(r.workload.name for r in records):
        first = found.get((labels[0], name))
        for label in labels:
            record = found.get((label, name))
            if record is None:
                continue
            figure_name = record.workload.headline.replace("_", " ")
            text = spread_text(record.headline) + (" FAULT" if record.faults else "")
            ratio = ratio_text(first, record, is_paired=took_turns) if first and label != labels[0] else "-"
            rows.append((name, figure_name, label, text, ratio))
    notes = ["Median [lowest, highest] of the repetitions.", *_warning_notes(records), *_other_models(records)]
    if len(labels) > 1:
        how = "over paired repetitions" if took_turns else "of runs made one after another, not in turns"
        notes.append(f"x: how many times better than {labels[0]}, with its 95 % interval {how}.")
    columns = ("Workload", "Figure", "Arm", "Median [lowest, highest]", "Ratio")
    return Grid(title="Workloads", columns=columns, rows=tuple(rows), notes=tuple(notes))


def details(records: Sequence[Record]) -> Grid:
    """One row per record: latencies, time in the server's line, cached tokens, energy, the load generator's cost."""
    rows = [
        (
            r.subject.label,
            r.workload.name,
            *(figure(r.metrics.get(m)) for m in ("ttft_ms", "queue_mean_ms", "tpot_ms", "itl_p99_ms")),
            figure(r.metrics.get("output_tokens_per_s")),
            "-" if r.num_cached_tokens is None else str(r.num_cached_tokens),
            *(
                "-" if q.value is None else number_text(q.value)
                for q in (r.mean_watts, r.tokens_per_watt, r.total_tokens_per_watt)
            ),
            figure(r.metrics.get("client_cpu_share")),
        )
        for r in records
    ]
    return Grid(
        title="Details",
        columns=(
            "Arm",
            "Workload",
            "TTFT ms",
            "Queue ms",
            "TPOT ms",
            "ITL p99 ms",
            "Output tok/s",
            "Cached tok",
            "Watts",
            "Output tok/J",
            "Total tok/J",
            "Client cores",
        ),
        rows=tuple(rows),
        notes=_fault_notes(records),
    )


def _warning_notes(records: Sequence[Record]) -> list[str]:
    """Warnings, those that several records share once; by how much a run was too short stands in its record."""
    by_text: dict[str, list[str]] = {}
    for record in records:
        for text in record.warnings:
            warning = "too short for a steady part" if text.startswith(NO_STEADY_PART) else text
            by_text.setdefault(warning, []).append(f"{record.subject.label}, {record.workload.name}")
    return [f"{'all' if len(where) == len(records) else '; '.join(where)}: {text}." for text, where in by_text.items()]


def _fault_notes(records: Sequence[Record]) -> tuple[str, ...]:
    faults = [f"FAULT {r.subject.label}, {r.workload.name}: {fault}" for r in records for fault in r.faults]
    gates = {f"QUALITY {r.subject.label}: {r.quality.note}": None for r in records if r.quality is not None}
    return (*faults, *gates)


def _other_models(records: Sequence[Record]) -> list[str]:
    """What to say when the sides of a run go by several names of the model."""
    models = list(dict.fromkeys(record.subject.model for record in records))
    return [f"The sides call their models {', '.join(models)}; are they the same?"] if len(models) > 1 else []


def _mismatch_notes(records: Sequence[Record]) -> tuple[str, ...]:
    """Why rows of one table are not like for like."""
    if not records:
        return ()
    notes: dict[str, None] = {}
    for model in dict.fromkeys(record.subject.model for record in records):
        own = [record for record in records if record.subject.model == model]
        for other in own[1:]:
            notes |= dict.fromkeys(f"Not like for like: {text}." for text in mismatches(own[0], other))
    return tuple(notes)


def to_rich(grid: Grid) -> Table:
    """The grid as a table for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = Text("\n".join(grid.notes)) if grid.notes else None
    table = Table(
        title=grid.title,
        caption=caption,
        title_style="bold",
        caption_style="dim",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in grid.columns:
        if column in _TEXT_COLUMNS:
            table.add_column(column, no_wrap=column not in _WRAPPED_COLUMNS)
        else:  # a word to a line: the column is then as narrow as its figures, and 80 characters hold the table
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def to_markdown(grid: Grid) -> str:
    """The grid as a Markdown table with its notes below."""
    lines = [f"| {' | '.join(grid.columns)} |", f"|{'---|' * len(grid.columns)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in grid.rows]
    lines += ["", *(f"- {note}" for note in grid.notes)]
    return "\n".join(lines) + "\n"


def grids_of(report: Report) -> list[Grid]:
    """Every table of a report: the matrix, the workloads of each model, details, cells that were skipped."""
    groups = compared_groups([report])
    compared = [comparison(records, took_turns=report.took_turns) for _, records in groups]
    found = [matrix(report.records), *compared, details(report.records)]
    if report.skipped:
        rows = tuple((s.model, s.backend, s.quantisation, s.reason) for s in report.skipped)
        found.append(Grid(title="Skipped", columns=("Model", "Backend", "Quantisation", "Why"), rows=rows))
    return found


def compared_groups(reports: Sequence[Report]) -> list[tuple[str, list[Record]]]:
    """(title, records) of what one table may compare: all sides of a run in turns, whatever they call the model, since
    they got the same prompts; else those of each model.
    """
    records = [record for report in reports for record in report.records]
    models = list(dict.fromkeys(record.subject.model for record in records))
    if len(reports) == 1 and reports[0].took_turns:
        return [(", ".join(models), records)] if records else []
    return [(model, [record for record in records if record.subject.model == model]) for model in models]


def report_markdown(report: Report) -> str:
    """Everything a reader needs beside the JSON: tables, machine, versions, command."""
    grids = grids_of(report)
    parts = [f"## {grid.title[0].upper() + grid.title[1:]}\n\n{to_markdown(grid)}" for grid in grids]
    return "\n".join(["# Benchmark\n", manifest_markdown(report.manifest), *parts])


def manifest_markdown(manifest: Manifest) -> str:
    """Machine, versions, commit and command as a list."""
    versions = ", ".join(f"{name} {number}" for name, number in (*manifest.versions.items(), *manifest.drivers.items()))
    return (
        f"- started: {manifest.started}\n"
        f"- chip: {manifest.chip}, {manifest.num_cores} cores, {manifest.memory_gib} GiB, "
        f"{' '.join(manifest.chip_features)}\n"
        f"- load average before the run: {manifest.load_average}\n- platform: {manifest.platform}\n"
        f"- versions: {versions}\n- commit: {manifest.commit}\n"
        + "".join(f"- power: {text}\n" for text in manifest.power_sources)
        + f"- command: `{manifest.command}`\n- seed: {manifest.seed}\n"
    )


def ratio_text(base: Record, record: Record, *, is_paired: bool = True) -> str:
    """How many times better `record` is than `base`. is_paired: over repetitions in which both took turns."""
    if not base.values or not record.values or (is_paired and len(base.values) != len(record.values)):
        return "x -"
    pair = (record.values, base.values) if record.workload.is_lower_better else (base.values, record.values)
    ratio = ratio_interval(*pair, is_paired=is_paired)
    if ratio.low is None or ratio.high is None:
        return f"x{ratio.value:.2f} (one run)"
    shown = "" if not ratio.low <= 1 <= ratio.high else ", no difference shown"
    return f"x{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{shown}"


def figure(spread: Spread | None) -> str:
    """The median in three significant digits, or a dash."""
    return "-" if spread is None else number_text(spread.median)


def spread_text(spread: Spread | None) -> str:
    """Median and range."""
    if spread is None:
        return "no result"
    return f"{number_text(spread.median)} [{number_text(spread.low)}, {number_text(spread.high)}]"


def number_text(value: float) -> str:
    """About three significant digits, never in scientific notation for everyday sizes."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _power_text(watts: Quantity) -> str:
    """Where the watts come from and how far to trust them, as a sentence."""
    error = watts.relative_error
    if watts.provenance is Provenance.ESTIMATED and error:
        trust = f", within a factor of {1 + error:.2g}"
    else:
        trust = f", ±{100 * error:.1g} %" if error else ""
    return f"Power {watts.provenance}: {watts.source.rstrip('.')}{trust}."
