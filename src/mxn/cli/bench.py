"""`mxn bench`: models served here, in process, or any OpenAI-compatible servers under load. Also: validate, compare."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mxn.bench.arms import Arm
    from mxn.bench.records import Report
    from mxn.bench.workloads import Workload

bench = typer.Typer(invoke_without_command=True, no_args_is_help=False, rich_markup_mode=None)


@bench.callback()
def run_bench(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model to serve and measure, or name to ask for at --url.")
    ] = None,
    quantisation: Annotated[
        str, typer.Option(help="Quantisations to measure, separated by commas; with --matrix, auto means all.")
    ] = "auto",
    backend: Annotated[
        str, typer.Option(help="Backend to measure; all: each that is active here, one after another.")
    ] = "auto",
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
        str | None,
        typer.Option(
            help="Workloads or sets of them, separated by commas: quick, all, W1, W2c8, W2c32, W3, W4, W4off. "
            "Left out: those that the options below describe, or quick."
        ),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: requests at once; several, separated by commas, are a sweep.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: requests per second; several, separated by commas, are a sweep.")
    ] = None,
    arrival: Annotated[
        str, typer.Option(help="Open loop: poisson, gamma, constant, or trace (times of the dataset).")
    ] = "poisson",
    burstiness: Annotated[float, typer.Option(help="Shape of gamma arrivals; below 1 they come in bursts.")] = 1.0,
    requests: Annotated[int, typer.Option(help="Requests (conversations) of a described workload.", min=1)] = 64,
    input_tokens: Annotated[int, typer.Option("--input", help="Prompt tokens, on average.", min=1)] = 128,
    output_tokens: Annotated[int, typer.Option("--output", help="Output tokens, on average.", min=1)] = 64,
    spread: Annotated[float, typer.Option(help="Lengths vary evenly by -+ this share.", min=0.0, max=1.0)] = 0.0,
    shared: Annotated[int, typer.Option(help="Leading prompt tokens that all requests share.", min=0)] = 0,
    turns: Annotated[int, typer.Option(help="Requests per conversation, history growing.", min=1)] = 1,
    think_s: Annotated[float, typer.Option("--think-s", help="Seconds between turns.", min=0.0)] = 0.0,
    dataset: Annotated[
        Path | None, typer.Option(help="JSONL of prompts, Mooncake trace (.jsonl) or Azure LLM trace (.csv).")
    ] = None,
    api: Annotated[str, typer.Option(help="What requests go through: completions, or chat.")] = "completions",
    slo: Annotated[
        str | None, typer.Option(help="Limits for goodput in ms, as ttft=500,tpot=50,request=10000.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Price of the chips per hour, for cost per million tokens.", min=0.0)
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", help="Times each workload runs on each arm.", min=1)
    ] = 3,
    idle_s: Annotated[
        float, typer.Option("--idle-s", help="Seconds for which idle power is watched before and after.", min=0.0)
    ] = 2.0,
    meter: Annotated[
        str | None, typer.Option(help="An outside meter: csv:FILE (columns time, watts) or command:COMMAND.")
    ] = None,
    meter_scope: Annotated[str, typer.Option(help="What it includes: device, host, node, wall or facility.")] = "wall",
    quality: Annotated[
        bool, typer.Option("--quality/--no-quality", help="Compare answers with the reference path (fp32 on the CPU).")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every model x backend x quantisation that fits on this machine.")
    ] = False,
    models: Annotated[
        str | None, typer.Option(help="With --matrix: models, separated by commas. Left out: those on this disk.")
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="With --matrix: folder of the cells; a second run resumes there.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer.json of the model at --url.")
    ] = None,
    label: Annotated[str, typer.Option(help="Name of the own arm in tables.")] = "mxn",
    api_key: Annotated[str | None, typer.Option(envvar="MXN_API_KEY", help="Key for the servers at --url.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all records to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables and charts to this file.")] = None,
) -> None:
    """Measure tokens/s, latency, watts, tokens per watt. Also: compare, validate.

    What is measured takes turns within each repetition, so that all meet the same conditions. Exits 1 when a request
    failed, yielded other than the asked number of tokens, or the answers fail the quality gate.
    """
    if context.invoked_subcommand is not None:
        return
    import asyncio
    from tempfile import TemporaryDirectory

    from mxn.bench.environment import busy_warning, manifest
    from mxn.bench.metrics import parse_slo
    from mxn.bench.records import Report
    from mxn.bench.workloads import PromptMaker, describe_workloads, over_chat, parse_workloads
    from mxn.cli import bench_arms
    from mxn.cli.console import err
    from mxn.cli.prepare import DEFAULT_MODEL
    from mxn.config.datasets import load_dataset
    from mxn.energy.external import external_reader
    from mxn.energy.reader import Scope
    from mxn.errors import ConfigError

    data = load_dataset(dataset, limit=requests) if dataset else None
    chosen: list[Workload] = parse_workloads(workloads) if workloads else []
    if not workloads and (concurrency or rate or data or turns > 1):
        chosen = describe_workloads(
            concurrency=concurrency,
            rate=rate,
            arrival=arrival,
            burstiness=burstiness,
            requests=requests,
            prompt_tokens=input_tokens,
            output_tokens=output_tokens,
            spread=spread,
            shared=shared,
            turns=turns,
            think_s=think_s,
            dataset=data,
        )
    chosen = chosen or parse_workloads("quick")
    if api not in ("completions", "chat"):
        raise ConfigError(f"--api {api!r} is unknown; available: completions, chat")
    if api == "chat":
        chosen = [over_chat(workload) for workload in chosen]
    limits = parse_slo(slo) if slo else None
    is_all = backend == "all"
    if matrix or is_all:
        from mxn.cli.bench_matrix import MatrixOptions, run_matrix

        with TemporaryDirectory() as fresh:
            report = run_matrix(
                MatrixOptions(
                    models=tuple(models.split(",")) if models else () if matrix else (model or DEFAULT_MODEL,),
                    backends=() if backend in ("auto", "all") else tuple(backend.split(",")),
                    quantisations=() if quantisation == "auto" and matrix else tuple(quantisation.split(",")),
                    workloads=tuple(chosen),
                    repetitions=repetitions,
                    idle_s=idle_s,
                    seed=seed,
                    is_gated=quality,
                ),
                out_folder if out_folder or matrix else Path(fresh),
            )
        finish(report, json_path=json_path, markdown=markdown, html=html)
        return
    reference_model = model or DEFAULT_MODEL
    reference = bench_arms.reference_of(reference_model) if quality else None
    readers = [external_reader(meter, scope=Scope(meter_scope))] if meter else []
    with ExitStack() as stack:
        arms: list[Arm] = []
        folder = str(tokenizer) if tokenizer else None
        if own or not url:
            names = quantisation.split(",")
            if in_process:
                found, own_folder = bench_arms.in_process_arms(
                    reference_model, names, backend=backend, threads=threads, label=label
                )
            else:
                found, own_folder = bench_arms.own_arms(
                    stack, reference_model, names, backend=backend, threads=threads, label=label, readers=readers
                )
            arms += found
            folder = folder or own_folder
        arms += [asyncio.run(bench_arms.url_arm(text, model, api_key, readers)) for text in url or ()]
        made = manifest(seed=seed, readers=arms[0].readers)
        if warning := busy_warning(made.load_average, made.num_cores):
            err().print(f"[yellow]note:[/] {warning}")
        prompts = PromptMaker(folder or bench_arms.local_folder(model or arms[0].subject.model), seed=seed)
        qualities = bench_arms.judge_arms(arms, reference) if reference else {}
        records = bench_arms.run(
            arms,
            chosen,
            prompts,
            repetitions=repetitions,
            idle_s=idle_s,
            slo=limits,
            dataset=data,
            seed=seed,
            price_per_hour=price,
        )
    records = bench_arms.judged(records, qualities)
    finish(Report(manifest=made, records=tuple(records)), json_path=json_path, markdown=markdown, html=html)


@bench.command()
def validate(files: Annotated[list[Path], typer.Argument(help="Records written by mxn bench --json.")]) -> None:
    """Check records against the schema that ships with mxn, and their figures against each other."""
    from mxn.bench.records import contradictions, load
    from mxn.cli.console import EXIT_FAILURE, err, out

    is_good = True
    for path in files:
        report = load(path)
        found = contradictions(report)
        is_good = is_good and not found
        for text in found:
            err().print(f"[red]{path}:[/] {text}", soft_wrap=True)
        if not found:
            out().print(f"{path}: {len(report.records)} records, schema version {report.schema_version}, consistent")
    if not is_good:
        raise typer.Exit(EXIT_FAILURE)


@bench.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Records of the base.")],
    second: Annotated[Path, typer.Argument(help="Records of what is compared with it.")],
) -> None:
    """How many times better the second report is, figure by figure, and what forbids the comparison.

    Exits 1 when nothing could be compared.
    """
    from mxn.bench.comparison import compare as compare_reports
    from mxn.bench.records import load
    from mxn.bench.report import Grid, to_rich
    from mxn.cli.console import EXIT_FAILURE, err, out

    found, warnings = compare_reports(load(first), load(second))
    rows = tuple((c.workload, c.first, c.second, c.metric.replace("_", " "), c.words) for c in found)
    if rows:
        columns = ("Workload", "First", "Second", "Figure", "Second is better by")
        grid = Grid(title="Comparison", columns=columns, rows=rows, notes=("Ratio with its 95 % interval.",))
        out().print(to_rich(grid))
    for warning in warnings:
        err().print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    if not rows:
        raise typer.Exit(EXIT_FAILURE)


def finish(report: Report, *, json_path: Path | None, markdown: Path | None, html: Path | None) -> None:
    """Shows the tables, writes the files, and exits 1 when a record is no result.

    The tables are on the screen before anything is written, so a full disk loses no measurement.
    """
    from mxn.bench.page import page
    from mxn.bench.records import save, write_whole
    from mxn.bench.report import grids_of, report_markdown, to_rich
    from mxn.cli.console import EXIT_FAILURE, err, out

    for grid in grids_of(report):
        out().print(to_rich(grid))
    if json_path:
        save(report, json_path)
    if markdown:
        write_whole(markdown, report_markdown(report).encode())
    if html:
        write_whole(html, page([report]).encode())
        err().print(f"[dim]page: {html}[/]")
    if any(not record.is_result for record in report.records):
        raise typer.Exit(EXIT_FAILURE)
