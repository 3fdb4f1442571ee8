"""What the load generator can do: requests and streamed tokens per second on one core, and what it adds to a TTFT.

python benchmarks/load_generator.py                      # 2,000 requests/s of 25 tokens for 10 s, then half of that

An open loop of even arrivals against `bare_server.py`. What the generator adds to a TTFT is seen by one more stream of
requests, in the same event loop, to a server that stamps when it had read a request and when it wrote the first token:
(read - sent) + (seen - written). That server does nothing else, and its core is its own whenever it wants it (real-time
priority, else the result says so), so what is left besides the generator is the way through the kernel. The generator
is pinned to one core, the servers to another.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mxn.bench.arrivals import arrival_times
from mxn.bench.client import CompletionsClient
from mxn.bench.load import Session, Turn, drive
from mxn.bench.metrics import percentile
from mxn.cli.own_server import own_server

SERVER = Path(__file__).with_name("bare_server.py")


async def measure(url: str, model: str, rate: float, tokens: int, seconds: float) -> None:
    client = CompletionsClient(url, model=model)
    times_s = arrival_times("constant", rate, round(rate * seconds), seed=0)
    sessions = [Session(turns=(Turn(text="hello", max_tokens=tokens),), at_s=at_s) for at_s in times_s]
    warm = await drive(client, sessions[:200], concurrency=64)
    run = await drive(client, sessions, concurrency=0)
    span_s = max(r.end_s for r in run.results) - run.begin_s
    failed = [r.error for r in (*warm.results, *run.results) if r.error]
    good = [r for r in run.results if not r.error]
    late_ms = [1e3 * (r.start_s - (r.scheduled_s or r.start_s)) for r in run.results]
    ttft_ms = [1e3 * (r.chunk_times_s[0] - r.start_s) for r in good]
    events = sum(len(r.chunk_times_s) for r in run.results)
    print(
        f"asked {rate:,.0f} requests/s of {tokens} tokens: answered {len(good) / span_s:,.0f} requests/s, "
        f"{sum(r.num_output_tokens for r in run.results) / span_s:,.0f} tokens/s in {events / span_s:,.0f} pieces/s; "
        f"generator {run.cpu_s / span_s:.2f} of a core; late p50 {percentile(late_ms, 50):.2f} ms, "
        f"p99 {percentile(late_ms, 99):.2f} ms; TTFT with the server's part p50 {percentile(ttft_ms, 50):.2f} ms, "
        f"p99 {percentile(ttft_ms, 99):.2f} ms; own event loop late p99 {1e3 * percentile(run.lag_s, 99):.2f} ms; "
        f"{len(failed)} failed{': ' + failed[0] if failed else ''}"
    )
    client.close()


async def measure_overhead(port: int, stamps_port: int, rate: float, tokens: int, seconds: float) -> None:
    """Under the same load, one more stream of requests to the server that stamps."""
    client = CompletionsClient(f"http://127.0.0.1:{port}/v1", model="m")
    probe = CompletionsClient(f"http://127.0.0.1:{stamps_port}/v1", model="m")
    times_s = arrival_times("constant", rate, round(rate * seconds), seed=0)
    sessions = [Session(turns=(Turn(text="hello", max_tokens=tokens),), at_s=at_s) for at_s in times_s]
    load = asyncio.create_task(drive(client, sessions, concurrency=0))
    out_ms: list[float] = []
    back_ms: list[float] = []
    await asyncio.sleep(0.5)
    while not load.done():
        result = await probe.complete("hello", 1, keeps_text=True)
        read_s, written_s = (float(part) for part in result.text.split()[:2])
        out_ms.append(1e3 * (read_s - result.start_s))
        back_ms.append(1e3 * (result.chunk_times_s[0] - written_s))
        await asyncio.sleep(0.005)
    added_ms = [there + back for there, back in zip(out_ms, back_ms, strict=True)]
    print(
        f"at {rate:,.0f} requests/s and {rate * tokens:,.0f} tokens/s the generator adds "
        f"p50 {statistics.median(added_ms):.2f} ms, p90 {percentile(added_ms, 90):.2f} ms, "
        f"p99 {percentile(added_ms, 99):.2f} ms to a TTFT ({len(added_ms)} requests; sending p99 "
        f"{percentile(out_ms, 99):.2f} ms, reading p99 {percentile(back_ms, 99):.2f} ms)"
    )
    client.close()
    probe.close()


def main(
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 2000.0,
    tokens: Annotated[int, typer.Option(help="Tokens per request.")] = 25,
    seconds: Annotated[float, typer.Option(help="How long each load runs.")] = 10.0,
    gateway: Annotated[
        str, typer.Option(help="A model: measure mxn's own server before the fake backend too, at 1, 1/2 and 1/4.")
    ] = "",
) -> None:
    """Measures the load generator on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    started_s = time.monotonic()
    with start_server(cores[-1]) as port, start_server(cores[-1], "--stamps", is_first=True) as stamps_port:
        asyncio.run(measure(f"http://127.0.0.1:{port}/v1", "m", rate, tokens, seconds))
        asyncio.run(measure_overhead(port, stamps_port, rate / 2, tokens, seconds))
    if gateway:
        os.sched_setaffinity(0, cores[-1:])  # inherited by the server's two processes
        with own_server(gateway, ["--backend", "fake", "--max-num-seqs", "256"]) as own:
            os.sched_setaffinity(0, cores[:1])
            for share in (1.0, 0.5, 0.25):
                asyncio.run(measure(own.url, own.name, share * rate, tokens, seconds))
    print(f"{time.monotonic() - started_s:.0f} s in all")


@contextmanager
def start_server(core: int, *options: str, is_first: bool = False) -> Iterator[int]:
    """The bare server on one core, before all others there when it `is_first`. Yields its port."""
    server = subprocess.Popen([sys.executable, str(SERVER), *options], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        os.sched_setaffinity(server.pid, {core})
        if is_first:
            try:
                os.sched_setscheduler(server.pid, os.SCHED_FIFO, os.sched_param(1))
            except PermissionError:
                print("no right to real-time priority: the stamping server shares its core, which is in the figures")
        yield port
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    typer.run(main)
