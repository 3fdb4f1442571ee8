"""`mxn demo`: serves a small model through real HTTP, asks it something, measures it, prints the matrix."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

BUDGET_S = 30.0
"""Seconds for measuring after which no further repetition begins."""

IDLE_S = 1.0
"""Seconds for which idle power is watched before and after."""

QUESTION = "What is the capital of France, and what is it known for? Answer in two sentences."


def demo(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to show.")] = None,
    question: Annotated[str, typer.Option(help="What to ask it.")] = QUESTION,
    quantisation: Annotated[str, typer.Option(help="Rows of the matrix, separated by commas.")] = "auto,fp32",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", help="Times each workload runs; fewer on a slow machine.", min=1)
    ] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all records to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Where to write the page; left out, demo.html in MXN_DATA_DIR.")
    ] = None,
) -> None:
    """Serve a small model, let it answer, measure it."""
    from mxn.bench.arms import Arm, HttpArm
    from mxn.bench.environment import manifest
    from mxn.bench.page import page
    from mxn.bench.records import Report, save, write_whole
    from mxn.bench.report import matrix, to_rich
    from mxn.bench.workloads import PromptMaker, parse_workloads
    from mxn.cli.bench_arms import run
    from mxn.cli.console import EXIT_FAILURE, err, out
    from mxn.cli.converse import Turn, converse, http_client
    from mxn.cli.own_server import own_server
    from mxn.cli.power import local_readers
    from mxn.cli.prepare import DEFAULT_MODEL
    from mxn.config.environment import data_dir

    started_s = time.monotonic()
    console, notes = out(), err()
    name = model or DEFAULT_MODEL
    arms: list[Arm] = []
    with ExitStack() as stack:
        for index, wanted in enumerate(quantisation.split(",")):
            notes.print(f"[bold]Starting[/] mxn serve {name} --quantisation {wanted}")
            server = stack.enter_context(own_server(name, ["--quantisation", wanted, "--kv-gib", "0.5"]))
            arm = HttpArm(
                server.subject(f"{server.backend} {server.quantisation}"),
                server.url,
                readers=local_readers(server.url, server.backend),
            )
            arms.append(arm)
            notes.print(f"  {server.url}: {server.backend}, {server.quantisation}, attention {server.attention}")
            if index == 0:
                folder, turn = server.folder, Turn()
                console.print(f"\n[bold]Question:[/] {question}")
                console.print("[bold]Answer:[/]", end=" ")
                message = {"role": "user", "content": question}
                with http_client() as client:
                    for piece in converse(
                        client, server.url, server.name, [message], turn, temperature=0, max_tokens=96
                    ):
                        console.print(piece, end="", markup=False, soft_wrap=True)
                console.print(f"\n[dim]{turn.stats_text()}[/]\n")
        prompts = PromptMaker(folder, seed=0)
        made = manifest(seed=0, readers=arms[0].readers)
        records = run(
            arms, parse_workloads("quick"), prompts, repetitions=repetitions, budget_s=BUDGET_S, idle_s=IDLE_S
        )
        console.print(to_rich(matrix(records)))
    report = Report(manifest=made, records=tuple(records))
    if json_path:
        save(report, json_path)
    html = html or data_dir() / "demo.html"
    write_whole(html, page([report]).encode())
    console.print(f"The same with charts: {html}", soft_wrap=True)
    notes.print(f"[dim]{time.monotonic() - started_s:.0f} s in all. Next: mxn serve, mxn chat, mxn bench --help[/]")
    if any(record.faults for record in records):
        raise typer.Exit(EXIT_FAILURE)
