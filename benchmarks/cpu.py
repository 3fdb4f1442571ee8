"""mxn on this machine's CPU beside every peer that is installed: one table, all sides taking turns in one run.

    python benchmarks/cpu.py SETUP.yaml [--out FILE.json] [--markdown FILE.md]

SETUP.yaml names the model and the peers with the same weights; `benchmarks/README.md` shows one. A peer whose files are
not on this machine is left out, and the table says so. Every side runs in processes of its own, which are stopped
while another one runs. With --out each workload is saved when it is done, and the same command goes on from there.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from bounds import WEIGHT_BITS, Ceilings, Shape, bound, measure_ceilings, shape_of
from peer_arms import WARM_UP, WARM_UP_TOKENS, Peer, PeerError, Setup, Turn, load_setup, started

from mxn.bench.environment import busy_warning, manifest
from mxn.bench.metrics import Spread
from mxn.bench.records import Record, Report, save
from mxn.bench.report import Grid, manifest_markdown, number_text, ratio_text, spread_text, to_markdown
from mxn.bench.runner import measure
from mxn.bench.workloads import WORKLOADS, PromptMaker, Workload
from mxn.cli.console import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, err
from mxn.config.datasets import Ask, Dataset
from mxn.engine.http_stream import TransportError
from mxn.errors import ConfigError, MxnError
from mxn.fleet.launchers.local import ENVIRONMENT
from mxn.store.fetch import fetch

IN_PROCESS, OVER_HTTP = "mxn in process", "mxn HTTP"

LONG = {
    w.name: w
    for w in (
        Workload(
            name="W5",
            title="one stream after 4,096 tokens, 64 out",
            num_requests=1,
            prompt_tokens=4096,
            output_tokens=64,
            concurrency=1,
            headline="decode_tokens_per_s",
        ),
        Workload(
            name="W5c8",
            title="8 streams at once, each after 4,096 tokens of its own, 32 out: of one stream",
            num_requests=8,
            prompt_tokens=4096,
            output_tokens=32,
            concurrency=8,
            headline="decode_tokens_per_s",
        ),
    )
}
"""Decoding with a long context. The prompts stay the same, so a side with a prefix cache computes them once."""

ALL = {name: (WORKLOADS | LONG)[name] for name in ("W1", "W2c8", "W2c32", "W3", "W4", "W5", "W5c8")}


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuReport(Report):
    """A report with what the machine could do at most. `absent`: peers that did not run, and why."""

    ceilings: Ceilings
    shape: Shape
    absent: tuple[str, ...] = ()


def main(
    setup: Annotated[Path, typer.Argument(help="YAML file with the model and its peers.")],
    workloads: Annotated[str, typer.Option(help=f"Separated by commas, of {', '.join(ALL)}.")] = ",".join(ALL),
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1)] = 5,
    quantisation: Annotated[str, typer.Option(help="mxn's quantisations, separated by commas.")] = "int8",
    threads: Annotated[int | None, typer.Option(help="mxn's compute threads.", min=1)] = None,
    kv_gib: Annotated[float, typer.Option(help="Memory for each KV cache of mxn.")] = 2.0,
    only: Annotated[str, typer.Option(help="Sides to run: labels separated by commas; all by default.")] = "",
    limit_s: Annotated[float, typer.Option(help="Seconds one side may take for one workload.")] = 120.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the prompts; another one for each run by default.")] = None,
    out_path: Annotated[Path | None, typer.Option("--out", help="JSON record; what it holds is not run again.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Compare mxn with the peers on this machine's CPU."""
    names = [name.strip() for name in workloads.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ALL]:
        raise ConfigError(f"unknown workload {', '.join(unknown)}; available: {', '.join(ALL)}")
    asked = load_setup(setup)
    quantisations = quantisation.split(",")
    options = ["--backend", "cpu", "--kv-gib", str(kv_gib), *(["--threads", str(threads)] if threads else [])]
    sides = [side for q in quantisations for side in own_sides(asked.model, q, quantisations, options)] + [*asked.peers]
    if only:
        wanted = [label.strip() for label in only.split(",")]
        if unknown := [label for label in wanted if label not in {side.label for side in sides}]:
            raise ConfigError(f"no side is called {', '.join(unknown)}; there are: {', '.join(s.label for s in sides)}")
        sides = [side for side in sides if side.label in wanted]
    report = asyncio.run(
        compare(
            asked,
            sides,
            [ALL[name] for name in names],
            repetitions=repetitions,
            limit_s=limit_s,
            seed=int(time.time()) if seed is None else seed,
            out_path=out_path,
        )
    )
    grids = tables(report)
    text = "\n".join(map(to_markdown, grids))
    print(text)
    if markdown:
        markdown.write_text(f"{manifest_markdown(report.manifest)}\n{text}")
    if any(record.faults for record in report.records):
        raise typer.Exit(EXIT_FAILURE)


def own_sides(model: str, quantisation: str, all_of_them: Sequence[str], settings: Sequence[str]) -> list[Peer]:
    """mxn in a process without HTTP, and its server."""
    suffix = f" {quantisation}" if len(all_of_them) > 1 else ""
    options = (*settings, "--quantisation", quantisation)
    port = free_port()
    serve = (sys.executable, "-m", "mxn.cli.main", "serve", model, "--port", str(port), *options)
    return [
        Peer(
            label=IN_PROCESS + suffix,
            worker="mxn",
            model=model,
            options=options,
            environment=ENVIRONMENT,
            quantisation=quantisation,
        ),
        Peer(label=OVER_HTTP + suffix, url=f"http://127.0.0.1:{port}/v1", command=serve, quantisation=quantisation),
    ]


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def compare(
    setup: Setup,
    sides: Sequence[Peer],
    workloads: Sequence[Workload],
    *,
    repetitions: int,
    limit_s: float,
    seed: int,
    out_path: Path | None,
) -> CpuReport:
    """Runs the workloads that the record at `out_path` lacks, and saves after each."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # peers are ended, not left stopped
    model = await asyncio.to_thread(fetch, setup.model, progress=lambda *_: None)
    shape = shape_of(model.folder, model.spec)
    absent = tuple(f"{side.label}: {side.missing}" for side in sides if side.missing)
    sides = [side for side in sides if not side.missing]
    report = earlier(out_path)
    if report is None:
        made = manifest(seed=seed)
        if warning := busy_warning(made.load_average, made.num_cores):
            say(warning)
        ceilings = measure_ceilings(made.num_cores, sorted(int(shape.weight_bytes(q)) for q in ("int4", "int8")))
        report = CpuReport(manifest=made, records=(), ceilings=ceilings, shape=shape, absent=absent)
    prompts = PromptMaker(model.folder, seed=seed)
    done = {record.workload.name for record in report.records}
    async with AsyncExitStack() as stack:
        turns: dict[int, Turn | str] = {}
        for workload in [workload for workload in workloads if workload.name not in done]:
            able = [side for side in sides if not side.workloads or workload.name in side.workloads]
            for side in able:
                if id(side) not in turns:
                    turns[id(side)] = turn = await start(side, stack, model.name, prompts, limit_s)
                    if isinstance(turn, str):
                        report = replace(report, absent=(*report.absent, f"{side.label}: {turn}"))
            arms = [turn for side in able if isinstance(turn := turns[id(side)], Turn)]
            if not arms:
                raise PeerError(f"no side of this comparison runs: {'; '.join(report.absent)}")
            report = with_records(report, await run(workload, arms, prompts, repetitions))
            again = measure_ceilings(report.ceilings.threads, report.ceilings.working_set_bytes)
            report = replace(report, ceilings=report.ceilings.best(again))
            say(f"ceilings: {again}")
            if out_path:
                save(report, out_path)
    return report


async def start(side: Peer, stack: AsyncExitStack, model: str, prompts: PromptMaker, limit_s: float) -> Turn | str:
    """The side, ready for its turns, or why it cannot be had."""
    say(f"{side.label}: starting")
    try:
        turn = await stack.enter_async_context(started(side, model, prompts, limit_s=limit_s))
        (answer,) = await turn.run([WARM_UP], WARM_UP_TOKENS, 1)
    except (PeerError, TransportError) as error:
        say(f"left out: {error}")
        return str(error).splitlines()[0]
    return turn if answer.error is None else answer.error


async def run(workload: Workload, arms: Sequence[Turn], prompts: PromptMaker, repetitions: int) -> list[Record]:
    """One workload on all sides. Long prompts are computed once beforehand, not timed."""
    kept = None
    if workload.name in LONG:
        texts = prompts.make(workload)
        kept = Dataset(name="kept", sha256="", asks=tuple(Ask(text=text) for text in texts))
        for arm in arms:
            say(f"{arm.subject.label}: {workload.name}, computing the prompts")
            await arm.read(texts)
    return await measure(
        arms, [workload], prompts, repetitions=repetitions, dataset=kept, progress=lambda what, *_: say(what)
    )


def earlier(path: Path | None) -> CpuReport | None:
    """The record of an interrupted run, or None. Raises: ConfigError when the file is something else."""
    if path is None or not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=CpuReport)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a record of this benchmark: {error}") from error


def with_records(report: CpuReport, records: Sequence[Record]) -> CpuReport:
    """The report with these records in place of older ones of the same workload."""
    names = {r.workload.name for r in records}
    kept = [r for r in report.records if r.workload.name not in names]
    order = list(ALL)
    return replace(report, records=tuple(sorted((*kept, *records), key=lambda r: order.index(r.workload.name))))


def tables(report: CpuReport) -> list[Grid]:
    """mxn beside the best peer of each workload, then every peer."""
    labels = list(dict.fromkeys(r.subject.label for r in report.records))
    own = [label for label in labels if label.startswith((IN_PROCESS, OVER_HTTP))]
    peers = [label for label in labels if label not in own]
    beside, each = [], []
    for workload in (w for w in ALL.values() if any(r.workload.name == w.name for r in report.records)):
        found = {r.subject.label: r for r in report.records if r.workload.name == workload.name}
        best = best_of([found[label] for label in peers if label in found and found[label].headline])
        title = (f"{workload.name}: {workload.title}", workload.headline.replace("_", " "))
        row = [*title, f"{best.subject.label} {spread_text(best.headline)}" if best else "-"]
        for label in own:
            record = found.get(label)
            row += [figure_text(record), share_text(record, report)]
            row.append(ratio_text(best, record) if best and record and record.headline else "-")
        beside.append(tuple(row))
        each.append((*title, *(figure_text(found.get(label)) for label in peers)))
    columns = ["Workload", "Figure", "Best peer"]
    for label in own:
        columns += [label, "of bound", "to best peer"]
    said = tuple(notes(report))
    return [
        Grid(title="mxn and the best peer", columns=tuple(columns), rows=tuple(beside)),
        Grid(title="Every peer", columns=("Workload", "Figure", *peers), rows=tuple(each), notes=said),
    ]


def figure_text(record: Record | None) -> str:
    """Median and range, and whether tokens were not as asked."""
    if record is None:
        return "not run"
    return spread_text(record.headline) + (" FAULT" if record.faults else "")


def best_of(records: Sequence[Record]) -> Record | None:
    """The record with the best median headline; None of none."""

    def value(record: Record) -> float:
        headline = record.headline
        assert isinstance(headline, Spread)
        return -headline.median if record.workload.is_lower_better else headline.median

    return max(records, key=value, default=None)


def share_text(record: Record | None, report: CpuReport) -> str:
    """How much of what the machine could do the record reaches."""
    if record is None or record.headline is None or record.subject.quantisation not in WEIGHT_BITS:
        return "-"
    limit = bound(record.workload, report.shape, record.subject.quantisation, report.ceilings)
    share = limit / record.headline.median if record.workload.is_lower_better else record.headline.median / limit
    return f"{100 * share:.0f} %"


def notes(report: CpuReport) -> list[str]:
    """What a reader must know beside the figures."""
    c = report.ceilings
    said = [
        "Median [lowest, highest] of the repetitions; sides took turns in each. x: how many times better than the best "
        "peer; median [lowest, highest] over paired repetitions.",
        f"Of bound: the share of what {c.threads} threads could do at most by ceilings measured in the same run: "
        f"{number_text(c.int8_gops)} GOP/s in int8, {number_text(c.attention_gflops)} GFLOP/s in attention, reading "
        + ", ".join(
            f"{number_text(size / 1e6)} MB at {number_text(rate)} GB/s"
            for size, rate in zip(c.working_set_bytes, c.read_gb_per_s, strict=True)
        )
        + ".",
    ]
    subjects = dict.fromkeys((r.subject.label, r.subject) for r in report.records)
    for label, subject in subjects:
        facts = [subject.interface, subject.quantisation]
        facts += [subject.program] if subject.program != "unknown" else []
        facts += [f"{subject.threads} threads"] if subject.threads else []
        facts += subject.notes if not label.startswith((IN_PROCESS, OVER_HTTP)) else ()
        said.append(f"{label}: {', '.join(facts)}")
    said += [f"Not here: {reason}" for reason in report.absent]
    said += [f"FAULT {r.subject.label}, {r.workload.name}: {fault}" for r in report.records for fault in r.faults]
    return said


def say(text: str) -> None:
    """Progress, one line each, so that a log of it reads well."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except asyncio.CancelledError:
        sys.exit(EXIT_INTERRUPTED)
    except MxnError as error:
        err().print(f"[red]error:[/] {error}", highlight=False)
        sys.exit(EXIT_USAGE)
