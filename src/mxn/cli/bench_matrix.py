"""`mxn bench --matrix`: every model x backend x quantisation that fits here, one after another, resumable."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxn.backends.base import Backend
    from mxn.bench.quality import Reference
    from mxn.bench.records import Manifest, Record, Report, Skipped
    from mxn.bench.workloads import Workload
    from mxn.core.chip import Chip
    from mxn.core.model import Model

_REFERENCE = ("cpu", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixOptions:
    """What to measure in each cell. Empty tuples mean all; is_gated compares answers with the reference path."""

    workloads: tuple[Workload, ...]
    repetitions: int
    seed: int
    idle_s: float = 0.0
    models: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    quantisations: tuple[str, ...] = ()
    is_gated: bool = False

    @property
    def digest(self) -> str:
        """Changes with anything that a finished cell depends on."""
        parts = (self.workloads, self.repetitions, self.seed, self.idle_s, self.is_gated)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cell:
    name: str
    model: Model
    backend: str
    quantisation: str


def run_matrix(options: MatrixOptions, folder: Path | None) -> Report:
    """Measures the cells that have no record in `folder` yet, and returns all of them as one report."""
    from mxn.bench.environment import manifest
    from mxn.bench.records import DiskError, Report, Skipped, load, save
    from mxn.cli.console import err
    from mxn.cli.power import local_readers
    from mxn.config.environment import data_dir
    from mxn.errors import MxnError

    folder = folder or data_dir() / "matrix"
    cells, skipped = plan_cells(options)
    readers = local_readers("http://127.0.0.1")
    made = manifest(seed=options.seed, readers=readers)
    for reader in readers:
        reader.close()
    notes = err()
    records: list[Record] = []
    references: dict[str, Reference] = {}
    took_s: list[float] = []
    for number, cell in enumerate(cells, start=1):
        path = _path(folder, cell, options)
        what = f"{number} of {len(cells)}: {cell.name}, {cell.backend} {cell.quantisation}"
        if path.exists():
            notes.print(f"{what}: taken from {path}", soft_wrap=True)
            records += _taken(load(path), made)
            continue
        left = sum(not _path(folder, other, options).exists() for other in cells[number - 1 :])
        about = f", about {_minutes(left * sum(took_s) / len(took_s))} left" if took_s else ""
        notes.print(f"[bold]{what}[/]{about}")
        started_s = time.monotonic()
        try:
            found = _measure(cell, options, references)
        except MxnError as why:
            notes.print(f"  skipped: {why}", soft_wrap=True)
            skipped.append(
                Skipped(model=cell.name, backend=cell.backend, quantisation=cell.quantisation, reason=str(why))
            )
            continue
        took_s.append(time.monotonic() - started_s)
        records += found
        try:
            save(Report(manifest=made, records=tuple(found)), path)
        except DiskError as why:  # its figures are in the report at the end all the same
            notes.print(f"  [yellow]not kept for a second run:[/] {why}", soft_wrap=True)
    return Report(manifest=made, records=tuple(records), skipped=tuple(skipped), took_turns=False)


def _taken(cell: Report, now: Manifest) -> list[Record]:
    """Records of an earlier run, which say so when something else than now was measured."""
    then = cell.manifest
    if (then.commit, then.versions) == (now.commit, now.versions):
        return list(cell.records)
    note = f"measured earlier, on {then.started}, at commit {then.commit}; the other cells at {now.commit}"
    return [replace(record, warnings=(*record.warnings, note)) for record in cell.records]


def plan_cells(options: MatrixOptions) -> tuple[list[_Cell], list[Skipped]]:
    """The cells that can run here, each model's reference first, and why the others cannot."""
    from mxn.backends.registry import installed_backends, load_backend
    from mxn.bench.records import ALL, Skipped
    from mxn.errors import MxnError

    cells: list[_Cell] = []
    skipped: list[Skipped] = []
    active: list[tuple[str, Backend, list[Chip]]] = []
    for name in options.backends or installed_backends():
        try:
            backend = load_backend(name)
            probe = backend.probe()
            chips = list(backend.chips()) if probe.state == "active" else []
        except MxnError as why:
            skipped.append(Skipped(model=ALL, backend=name, quantisation=ALL, reason=str(why)))
            continue
        if not chips:
            reason = f"{probe.state}: {probe.reason}"
            skipped.append(Skipped(model=ALL, backend=name, quantisation=ALL, reason=reason))
        elif options.backends or not backend.capabilities(chips[0]).is_scripted:
            active.append((name, backend, chips))
    models, not_here = _models(options.models)
    skipped += not_here
    for shown, model in models:
        for name, backend, chips in active:
            found, refused = _cells_of(shown, model, name, backend, chips[0], options.quantisations)
            cells += found
            skipped += refused
    cells.sort(key=lambda cell: (cell.name, (cell.backend, cell.quantisation) != _REFERENCE))
    return cells, skipped


def _models(names: tuple[str, ...]) -> tuple[list[tuple[str, Model]], list[Skipped]]:
    """Models by the names given, fetched when needed; without names, those that are on this disk."""
    from mxn.bench.records import ALL, Skipped
    from mxn.cli.prepare import DEFAULT_MODEL
    from mxn.cli.progress import Phases
    from mxn.config.model_card import load_model_cards
    from mxn.errors import MxnError
    from mxn.store.fetch import fetch, list_cached

    cards = load_model_cards()
    wanted = names or tuple(dict.fromkeys([DEFAULT_MODEL, *(one.name for one in list_cached())]))
    found: list[tuple[str, Model]] = []
    skipped: list[Skipped] = []
    for name in wanted:
        card = cards.get(name)
        if card is not None and card.kind != "decoder":
            skipped.append(Skipped(model=name, backend=ALL, quantisation=ALL, reason=f"it is a {card.kind} model"))
            continue
        try:
            with Phases() as phases:
                found.append((name, fetch(name, progress=phases)))
        except MxnError as why:
            skipped.append(Skipped(model=name, backend=ALL, quantisation=ALL, reason=str(why)))
    if not names:
        absent = [name for name, card in cards.items() if name not in wanted and card.kind == "decoder"]
        reason = f"not on this disk, so not measured: {', '.join(absent)}; name them with --models to fetch them"
        skipped += (
            [Skipped(model=f"{len(absent)} more", backend=ALL, quantisation=ALL, reason=reason)] if absent else []
        )
    return found, skipped


def _cells_of(
    name: str, model: Model, backend_name: str, backend: Backend, chip: Chip, wanted: tuple[str, ...]
) -> tuple[list[_Cell], list[Skipped]]:
    """One model on one backend: a cell for every quantisation that it supports and that fits the chip's memory."""
    from mxn.bench.records import ALL, Skipped
    from mxn.core.model import LoadSettings

    support = backend.supports(model.spec, chip)
    if support.verdict == "no":
        reason = "; ".join(support.reasons)
        return [], [Skipped(model=name, backend=backend_name, quantisation=ALL, reason=reason)]
    cells, skipped = [], []
    for quantisation in wanted or support.quantisations or ("auto",):
        settings = LoadSettings(quantisation=quantisation)  # type: ignore[arg-type]
        estimate = backend.estimate(model.spec, settings, chip)
        parts = (estimate.weights, estimate.kv_cache, estimate.activations, estimate.overhead)
        needed = sum(part.value or 0.0 for part in parts)
        if support.quantisations and quantisation not in (*support.quantisations, "auto"):
            reason = f"not offered by {backend_name}; it has {', '.join(support.quantisations)}"
        elif needed > chip.memory_bytes:
            reason = f"needs about {needed / 2**30:.1f} GiB, {chip.uid} has {chip.memory_bytes / 2**30:.1f} GiB free"
        else:
            cells.append(_Cell(name=name, model=model, backend=backend_name, quantisation=quantisation))
            continue
        skipped.append(Skipped(model=name, backend=backend_name, quantisation=quantisation, reason=reason))
    return cells, skipped


def _measure(cell: _Cell, options: MatrixOptions, references: dict[str, Reference]) -> list[Record]:
    """One cell in a server of its own."""
    from mxn.bench.arms import HttpArm
    from mxn.bench.workloads import PromptMaker
    from mxn.cli.bench_arms import ask_reference, judge_arms, judged, own_arms, reference_of, run

    if options.is_gated and cell.name not in references and (cell.backend, cell.quantisation) != _REFERENCE:
        references[cell.name] = reference_of(cell.name)
    with ExitStack() as stack:
        label = f"{cell.backend} {cell.quantisation}"
        arms, folder = own_arms(
            stack,
            cell.name,
            [cell.quantisation],
            backend=cell.backend,
            threads=None,
            label=label,
            is_quiet=True,  # a cell that cannot load says why in the report, and the matrix goes on
        )
        arms[0].subject = replace(arms[0].subject, model=cell.name)
        qualities = {}
        if options.is_gated and isinstance(arms[0], HttpArm):
            if cell.name not in references:
                references[cell.name] = ask_reference(arms[0].asker(), label)
            qualities = judge_arms(arms, references[cell.name])
        records = run(
            arms,
            list(options.workloads),
            PromptMaker(folder, seed=options.seed),
            repetitions=options.repetitions,
            idle_s=options.idle_s,
            seed=options.seed,
        )
        return judged(records, qualities)


def _path(folder: Path, cell: _Cell, options: MatrixOptions) -> Path:
    name = f"{cell.name}--{cell.backend}--{cell.quantisation}--{options.digest}.json"
    return folder / name.replace("/", "_")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
