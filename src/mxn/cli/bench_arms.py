"""Arms of a benchmark from what a user named: own servers, engines in this process, servers at a URL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mxn.bench.arms import Arm, HttpArm
    from mxn.bench.quality import Asker, Reference
    from mxn.bench.records import Quality, Record
    from mxn.bench.workloads import PromptMaker, Workload
    from mxn.energy.reader import PowerReader

REFERENCE_OPTIONS = ("--backend", "cpu", "--quantisation", "fp32")
"""The reference path: float32 weights in the models' own modules, which everything else is compared with."""


def own_arms(
    stack: ExitStack,
    model: str,
    quantisations: Sequence[str],
    *,
    backend: str,
    threads: int | None,
    label: str,
    readers: Sequence[PowerReader] = (),
    is_quiet: bool = False,
) -> tuple[list[Arm], str]:
    """One server process per quantisation, all up at once. Returns: arms, tokenizer folder.

    readers: what meters the power, instead of what the backends offer. is_quiet: their progress is not shown.
    """
    from mxn.bench.arms import HttpArm
    from mxn.cli.own_server import own_server
    from mxn.cli.power import local_readers

    arms: list[Arm] = []
    folder = ""
    for quantisation in quantisations:
        options = ["--backend", backend, "--quantisation", quantisation]
        options += ["--threads", str(threads)] if threads else []
        server = stack.enter_context(own_server(model, options, is_quiet=is_quiet))
        name = label if len(quantisations) == 1 else f"{label} {server.quantisation}"
        arms.append(
            HttpArm(
                server.subject(name), server.url, readers=tuple(readers) or local_readers(server.url, server.backend)
            )
        )
        folder = server.folder
    return arms, folder


def in_process_arms(
    model: str, quantisations: Sequence[str], *, backend: str, threads: int | None, label: str
) -> tuple[list[Arm], str]:
    """One engine per quantisation in this process. Returns: arms, tokenizer folder."""
    from mxn.bench.in_process import InProcessArm
    from mxn.cli.prepare import deployment_config, prepare
    from mxn.cli.progress import Phases

    arms: list[Arm] = []
    folder = ""
    for quantisation in quantisations:
        with Phases() as phases:
            config = deployment_config(model=model, backend=backend, quantisation=quantisation, threads=threads)
            prepared = prepare(config, phases)
            folder = prepared.spec.model.folder
            arm = InProcessArm.load(
                prepared.backend,
                prepared.chip,
                prepared.spec.model,
                prepared.spec.placements[0].settings,
                label=label if len(quantisations) == 1 else f"{label} {quantisation}",
                progress=phases,
            )
        prepared.power.close()
        arms.append(arm)
    return arms, folder


async def url_arm(text: str, model: str | None, api_key: str | None, readers: Sequence[PowerReader] = ()) -> HttpArm:
    """An arm for `[LABEL=]URL`."""
    from mxn.bench.arms import HttpArm, describe
    from mxn.cli.power import local_readers

    label, separator, url = text.partition("=")
    if not separator or "://" in label:
        label, url = text, text
    subject = await describe(url, label, model=model, api_key=api_key)
    return HttpArm(subject, url, readers=tuple(readers) or local_readers(url, subject.backend), api_key=api_key)


def local_folder(model: str) -> str:
    """Folder of a model that is on this disk, for its tokenizer."""
    from mxn.cli.progress import Phases
    from mxn.store.fetch import fetch

    with Phases() as phases:
        return fetch(model, progress=phases).folder


def reference_of(model: str) -> Reference:
    """What the reference path says, from a server of its own that ends before anything is measured."""
    from mxn.bench.quality import Asker
    from mxn.cli.own_server import own_server

    with own_server(model, [*REFERENCE_OPTIONS, "--kv-gib", "0.5"]) as server:
        return ask_reference(
            Asker(server.url, model=server.name), f"{server.backend} {server.quantisation} ({server.attention})"
        )


def ask_reference(asker: Asker, name: str) -> Reference:
    """What a running server says, as the reference for others."""
    from mxn.bench.quality import take_reference

    async def ask() -> Reference:
        try:
            return await take_reference(asker, name)
        finally:
            asker.close()

    return asyncio.run(ask())


def judged(records: Sequence[Record], qualities: dict[str, Quality]) -> list[Record]:
    """The records with the verdict on their subject."""
    return [replace(record, quality=qualities.get(record.subject.label)) for record in records]


def judge_arms(arms: Sequence[Arm], reference: Reference) -> dict[str, Quality]:
    """The quality of every arm, by label."""
    from mxn.bench.quality import judge

    async def ask() -> dict[str, Quality]:
        found = {}
        for arm in arms:
            asker = arm.asker()
            try:
                found[arm.subject.label] = await judge(asker, reference)
            finally:
                asker.close()
        return found

    return asyncio.run(ask())


def run(
    arms: list[Arm], workloads: list[Workload], prompts: PromptMaker, *, repetitions: int, **options: object
) -> list[Record]:
    """Measures with progress on the terminal, and closes the arms. `options`: see `measure`."""
    import asyncio

    from mxn.bench.runner import measure
    from mxn.cli.progress import Phases

    async def measure_and_close() -> list[Record]:
        try:
            return await measure(
                arms,
                workloads,
                prompts,
                repetitions=repetitions,
                progress=show,
                **options,  # type: ignore[arg-type]
            )
        finally:
            for arm in arms:
                arm.close()

    with Phases() as phases:

        def show(what: str, done: int, total: int) -> None:
            phases("measure", done / total, what)

        return asyncio.run(measure_and_close())
