"""`mxn bench`: the serving workloads against models served here, in process, or any OpenAI-compatible servers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mxn.bench.arms import Arm
    from mxn.bench.records import Record
    from mxn.bench.workloads import PromptMaker, Workload


def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to serve and measure, or name to ask for at --url.")
    ] = None,
    quantisation: Annotated[str, typer.Option(help="Quantisations to measure, separated by commas.")] = "auto",
    backend: Annotated[str, typer.Option(help="Backend to measure.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Compute threads on a CPU.", min=1)] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Drive the engine in this process, without HTTP.")
    ] = False,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="[LABEL=]URL of a server that runs already, as peer=http://127.0.0.1:8080/v1; may be repeated."
        ),
    ] = None,
    own: Annotated[
        bool, typer.Option("--own/--no-own", help="Measure an own mxn server too when --url is given.")
    ] = False,
    workloads: Annotated[
        str,
        typer.Option(
            help="Workloads or sets of them, separated by commas: quick, all, W1, W2c8, W2c32, W3, W4, W4off."
        ),
    ] = "quick",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", help="Times each workload runs on each arm.", min=1)
    ] = 3,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer.json of the model at --url.")
    ] = None,
    label: Annotated[str, typer.Option(help="Name of the own arm in tables.")] = "mxn",
    api_key: Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key for the servers at --url.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all records to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
) -> None:
    """Measure tokens/s, latency, watts, tokens per watt.

    What is measured takes turns within each repetition, so that all meet the same conditions. Exits 1 when a request
    failed or yielded other than the asked number of tokens.
    """
    import asyncio

    from mxn.bench.environment import busy_warning, manifest
    from mxn.bench.records import Report, save
    from mxn.bench.report import comparison, details, matrix, report_markdown, to_rich
    from mxn.bench.workloads import PromptMaker, parse_workloads
    from mxn.cli.console import EXIT_FAILURE, err, out
    from mxn.cli.prepare import DEFAULT_MODEL

    chosen, made = parse_workloads(workloads), manifest(seed=seed)
    if warning := busy_warning(made.load_average, made.num_cores):
        err().print(f"[yellow]note:[/] {warning}")
    with ExitStack() as stack:
        arms: list[Arm] = []
        folder = str(tokenizer) if tokenizer else None
        if own or not url:
            subject = model if model and not url else DEFAULT_MODEL if model is None else model
            start = _in_process_arms if in_process else _own_arms
            own_arms, own_folder = start(
                stack, subject, quantisation.split(","), backend=backend, threads=threads, label=label
            )
            arms += own_arms
            folder = folder or own_folder
        arms += [asyncio.run(_url_arm(text, model, api_key)) for text in url or ()]
        prompts = PromptMaker(folder or _local_folder(model or arms[0].subject.model), seed=seed)
        records = run(arms, chosen, prompts, repetitions=repetitions)
    report = Report(manifest=made, records=tuple(records))
    console = out()
    for grid in (matrix(records), comparison(records), details(records)):
        console.print(to_rich(grid))
    if json_path:
        save(report, json_path)
    if markdown:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(report_markdown(report))
    if any(record.faults for record in records):
        raise typer.Exit(EXIT_FAILURE)


def run(
    arms: list[Arm], workloads: list[Workload], prompts: PromptMaker, *, repetitions: int, budget_s: float = 1e9
) -> list[Record]:
    """Measures with progress on the terminal, and closes the arms. `budget_s`: see `measure`."""
    import asyncio

    from mxn.bench.runner import measure
    from mxn.cli.progress import Phases

    async def measure_and_close() -> list[Record]:
        try:
            return await measure(arms, workloads, prompts, repetitions=repetitions, budget_s=budget_s, progress=show)
        finally:
            for arm in arms:
                arm.close()

    with Phases() as phases:

        def show(what: str, done: int, total: int) -> None:
            phases("measure", done / total, what)

        return asyncio.run(measure_and_close())


def _own_arms(
    stack: ExitStack, model: str, quantisations: list[str], *, backend: str, threads: int | None, label: str
) -> tuple[list[Arm], str]:
    """One server process per quantisation, all up at once. Returns: arms, tokenizer folder."""
    from mxn.bench.arms import HttpArm
    from mxn.cli.own_server import own_server
    from mxn.cli.power import local_readers

    arms: list[Arm] = []
    folder = ""
    for quantisation in quantisations:
        options = ["--backend", backend, "--quantisation", quantisation]
        options += ["--threads", str(threads)] if threads else []
        server = stack.enter_context(own_server(model, options))
        name = label if len(quantisations) == 1 else f"{label} {server.quantisation}"
        arms.append(HttpArm(server.subject(name), server.url, readers=local_readers(server.url)))
        folder = server.folder
    return arms, folder


def _in_process_arms(
    stack: ExitStack, model: str, quantisations: list[str], *, backend: str, threads: int | None, label: str
) -> tuple[list[Arm], str]:
    """One engine per quantisation in this process. Returns: arms, tokenizer folder."""
    from mxn.bench.in_process import InProcessArm
    from mxn.cli.prepare import deployment_config, prepare
    from mxn.cli.progress import Phases
    from mxn.engine.tokenizer import Tokenizer

    arms: list[Arm] = []
    folder = ""
    for quantisation in quantisations:
        with Phases() as phases:
            config = deployment_config(model=model, backend=backend, quantisation=quantisation, threads=threads)
            prepared = prepare(config, phases)
            folder = prepared.spec.model.folder
            tokenizer = Tokenizer.load(folder)
            arm = InProcessArm.load(
                prepared.backend,
                prepared.chip,
                prepared.spec.model,
                prepared.spec.settings,
                encode=lambda text, t=tokenizer: t.encode(text, add_special_tokens=True),  # type: ignore[misc]
                label=label if len(quantisations) == 1 else f"{label} {quantisation}",
                progress=phases,
            )
        prepared.power.close()
        arms.append(arm)
    return arms, folder


async def _url_arm(text: str, model: str | None, api_key: str | None) -> Arm:
    """An arm for `[LABEL=]URL`."""
    from mxn.bench.arms import HttpArm, describe
    from mxn.cli.power import local_readers

    label, separator, url = text.partition("=")
    if not separator or "://" in label:
        label, url = text, text
    subject = await describe(url, label, model=model, api_key=api_key)
    return HttpArm(subject, url, readers=local_readers(url), api_key=api_key)


def _local_folder(model: str) -> str:
    """Folder of a model that is on this disk, for its tokenizer."""
    from mxn.cli.progress import Phases
    from mxn.store.fetch import fetch

    with Phases() as phases:
        return fetch(model, progress=phases).folder
