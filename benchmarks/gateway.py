"""What mxn's gateway adds to a request: real HTTP in front of the fake backend, which answers at once.

Prints p50 and p99 of a non-streamed request for one token at concurrency 1, and streamed tokens/s at higher
concurrency. The time covers everything between client and engine: HTTP, validation, tokenizing, the hop to the replica
process and back, detokenizing. Nothing is subtracted; `--floor` also measures a bare HTTP server that answers the same
bytes, which shows how much of it is the client, the kernel and the interpreter.

    python benchmarks/gateway.py [--model FOLDER_OR_CARD] [--requests 2000] [--floor] [--json OUT]
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mxn.bench.client import CompletionsClient
from mxn.bench.environment import manifest
from mxn.bench.metrics import percentile
from mxn.cli.own_server import own_server
from mxn.cli.prepare import DEFAULT_MODEL

PROMPT = "the quick brown fox jumps over the lazy dog " * 3


def main(
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used.")] = DEFAULT_MODEL,
    requests: Annotated[int, typer.Option(help="Requests for the percentiles.", min=100)] = 2000,
    floor: Annotated[bool, typer.Option("--floor", help="Measure a bare server too.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure what the gateway adds to a request."""
    figures: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        server = stack.enter_context(own_server(model, ["--backend", "fake", "--max-num-seqs", "128"]))
        figures["mxn"] = asyncio.run(measure(server.url, server.name, requests))
        if floor:
            figures["bare server"] = asyncio.run(measure_floor(requests))
    for label, values in figures.items():
        print(label)
        for name, value in values.items():
            print(f"  {name:<44} {value:12,.2f}")
    if json_path:
        json_path.write_text(json.dumps({"manifest": asdict(manifest(seed=0)), "figures": figures}, indent=1) + "\n")


async def measure(url: str, model: str, requests: int) -> dict[str, float]:
    """Latency of single requests, then throughput of many streams."""
    client = CompletionsClient(url, model=model)
    figures = await latency(client, requests)
    for concurrency in (1, 8, 32, 64):
        figures |= await streaming(client, concurrency)
    figures |= await request_rate(client, 32)
    client.close()
    return figures


async def latency(client: CompletionsClient, requests: int) -> dict[str, float]:
    """One request at a time, one token, not streamed."""
    times_ms = []
    for i in range(requests + 100):
        result = await client.complete(f"{i} {PROMPT}", 1, stream=False)
        if result.error:
            raise SystemExit(f"request failed: {result.error}")
        if i >= 100:
            times_ms.append(1e3 * (result.end_s - result.start_s))
    return {f"one token, concurrency 1, p{p} ms": percentile(times_ms, p) for p in (50, 90, 99)}


async def streaming(client: CompletionsClient, concurrency: int, num_tokens: int = 256) -> dict[str, float]:
    """Streams of many tokens; also how many pieces arrived, since fast tokens share pieces."""
    prompts = [f"{i} {PROMPT}" for i in range(4 * concurrency)]
    start_s, cpu_s = time.perf_counter(), time.process_time()
    results = await client.run(prompts, num_tokens, concurrency)
    seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    errors = [r.error for r in results if r.error]
    if errors:
        raise SystemExit(f"request failed: {errors[0]}")
    name = f"streams, concurrency {concurrency}"
    return {
        f"{name}, tokens/s": sum(r.num_output_tokens for r in results) / seconds,
        f"{name}, pieces/s": sum(len(r.chunk_times_s) for r in results) / seconds,
        f"{name}, client cores": cpu_s / seconds,
    }


async def request_rate(client: CompletionsClient, concurrency: int, requests: int = 2000) -> dict[str, float]:
    """One-token streamed requests as fast as they go."""
    start_s = time.perf_counter()
    results = await client.run([f"{i} {PROMPT}" for i in range(requests)], 1, concurrency)
    seconds = time.perf_counter() - start_s
    return {f"one token, concurrency {concurrency}, requests/s": sum(r.error is None for r in results) / seconds}


async def measure_floor(requests: int) -> dict[str, float]:
    """The same client against a server of a few lines in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name("bare_server.py")), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        client = CompletionsClient(f"http://127.0.0.1:{port}/v1", model="bare")
        figures = await latency(client, requests)
        for concurrency in (1, 32):
            figures |= await streaming(client, concurrency)
        figures |= await request_rate(client, 32)
        client.close()
        return figures
    finally:
        process.terminate()
        await process.wait()


if __name__ == "__main__":
    typer.run(main)
