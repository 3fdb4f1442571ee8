"""What the way through Ray adds: the same requests through both launchers in one run, fake backend, this machine.

Both servers are real: `mxn serve` and `mxn up --ray` with the same file. Each round measures one after the other;
printed are medians over the rounds with the lowest and highest, for one-token requests one at a time (p50, p99) and
for streams of many tokens at several concurrencies.

    python benchmarks/ray_path.py [--model FOLDER_OR_CARD] [--rounds 3] [--requests 300] [--json OUT]
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from gateway import latency, streaming

from mxn.bench.client import CompletionsClient
from mxn.bench.environment import manifest
from mxn.cli.prepare import DEFAULT_MODEL

Figures = dict[str, float]


def main(
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used.")] = DEFAULT_MODEL,
    backend: Annotated[str, typer.Option(help="Backend: fake, or one that computes.")] = "fake",
    rounds: Annotated[int, typer.Option(help="Times both are measured, in turn.", min=1)] = 3,
    requests: Annotated[int, typer.Option(help="One-token requests per round.", min=50)] = 300,
    concurrency: Annotated[str, typer.Option(help="Streams at once, separated by commas.")] = "1,8,32",
    tokens: Annotated[int, typer.Option(help="Tokens of a stream.", min=1)] = 256,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure what the launcher ray adds to a request beside the launcher local."""
    levels = [int(level) for level in concurrency.split(",")]
    found: dict[str, list[Figures]] = {"local": [], "ray": []}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "mxn.yaml"
        settings = {"name": "m", "model": model, "backend": backend, "max_num_seqs": 128, "kv_gib": 1}
        file.write_text(json.dumps({"deployments": [settings]}))
        urls = {
            "local": stack.enter_context(serving("serve", str(file))),
            "ray": stack.enter_context(serving("up", "--ray", str(file))),
        }
        for _ in range(rounds):
            for launcher, url in urls.items():
                found[launcher].append(asyncio.run(measure(url, requests, levels, tokens)))
    for name in found["local"][0]:
        print(f"{name:<40} " + "   ".join(f"{launcher} {_text(found[launcher], name)}" for launcher in found))
    if json_path:
        json_path.write_text(json.dumps({"manifest": asdict(manifest(seed=0)), "figures": found}, indent=1) + "\n")


async def measure(url: str, requests: int, levels: list[int], tokens: int) -> Figures:
    """One round of one launcher."""
    client = CompletionsClient(url, model="m")
    figures = await latency(client, requests)
    for level in levels:
        figures |= await streaming(client, level, tokens)
    client.close()
    return {name: value for name, value in figures.items() if "cores" not in name and "pieces" not in name}


@contextmanager
def serving(*command: str) -> Iterator[str]:
    """An mxn that runs `command` on a free port; its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mxn.cli.main", *command, "--port", str(port), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _text(rounds: list[Figures], name: str) -> str:
    values = [figures[name] for figures in rounds]
    return f"{statistics.median(values):,.2f} [{min(values):,.2f}, {max(values):,.2f}]"


if __name__ == "__main__":
    typer.run(main)
