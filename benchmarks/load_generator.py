"""What the load generator can do: requests and streamed tokens per second on one core, and what it adds to a TTFT.

python benchmarks/load_generator.py                      # 2,000 requests/s of 25 tokens for 10 s, then half of that

An open loop of even arrivals against `bare_server.py`, which stamps when it had read a request and when it wrote the
first token. What it adds to a TTFT: (read - sent) + (seen - written), so the network and the server's event loop are
in it too. The generator is pinned to one core, the server to another.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mxn.bench.arrivals import arrival_times
from mxn.bench.client import CompletionsClient
from mxn.bench.load import Session, Turn, drive
from mxn.bench.metrics import percentile

SERVER = Path(__file__).with_name("bare_server.py")


async def measure(port: int, rate: float, tokens: int, seconds: float) -> None:
    client = CompletionsClient(f"http://127.0.0.1:{port}/v1", model="m")
    times_s = arrival_times("constant", rate, round(rate * seconds), seed=0)
    sessions = [Session(turns=(Turn(text="hello", max_tokens=tokens),), at_s=at_s) for at_s in times_s]
    warm = await drive(client, sessions[:200], concurrency=64)
    run = await drive(client, sessions, concurrency=0)
    span_s = max(r.end_s for r in run.results) - run.begin_s
    failed = [r.error for r in (*warm.results, *run.results) if r.error]
    late_ms = [1e3 * (r.start_s - (r.scheduled_s or r.start_s)) for r in run.results]
    ttft_ms = [1e3 * (r.chunk_times_s[0] - r.start_s) for r in run.results]
    events = sum(len(r.chunk_times_s) for r in run.results)
    print(
        f"asked {rate:,.0f} requests/s of {tokens} tokens: sent {len(run.results) / span_s:,.0f} requests/s, "
        f"{sum(r.num_output_tokens for r in run.results) / span_s:,.0f} tokens/s in {events / span_s:,.0f} pieces/s; "
        f"generator {run.cpu_s / span_s:.2f} of a core; late p50 {percentile(late_ms, 50):.2f} ms, "
        f"p99 {percentile(late_ms, 99):.2f} ms; TTFT with the server's part p50 {percentile(ttft_ms, 50):.2f} ms, "
        f"p99 {percentile(ttft_ms, 99):.2f} ms; own event loop late p99 {1e3 * percentile(run.lag_s, 99):.2f} ms; "
        f"{len(failed)} failed"
    )
    client.close()


async def measure_overhead(port: int, rate: float, tokens: int, seconds: float) -> None:
    """Under the same load, one more stream of requests that keep the server's stamps."""
    client = CompletionsClient(f"http://127.0.0.1:{port}/v1", model="m")
    times_s = arrival_times("constant", rate, round(rate * seconds), seed=0)
    sessions = [Session(turns=(Turn(text="hello", max_tokens=tokens),), at_s=at_s) for at_s in times_s]
    load = asyncio.create_task(drive(client, sessions, concurrency=0))
    added_ms: list[float] = []
    await asyncio.sleep(0.5)
    while not load.done():
        result = await client.complete("hello", 1, keeps_text=True)
        read_s, written_s = (float(part) for part in result.text.split()[:2])
        added_ms.append(1e3 * ((read_s - result.start_s) + (result.chunk_times_s[0] - written_s)))
        await asyncio.sleep(0.005)
    print(
        f"at {rate:,.0f} requests/s and {rate * tokens:,.0f} tokens/s the way to the server and back adds "
        f"p50 {statistics.median(added_ms):.2f} ms, p90 {percentile(added_ms, 90):.2f} ms, "
        f"p99 {percentile(added_ms, 99):.2f} ms to a TTFT ({len(added_ms)} requests)"
    )
    client.close()


def main(
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 2000.0,
    tokens: Annotated[int, typer.Option(help="Tokens per request.")] = 25,
    seconds: Annotated[float, typer.Option(help="How long each load runs.")] = 10.0,
) -> None:
    """Measures the load generator on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    server = subprocess.Popen(
        [sys.executable, str(SERVER), "--stamps"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[-1:]),
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        started_s = time.monotonic()
        asyncio.run(measure(port, rate, tokens, seconds))
        asyncio.run(measure_overhead(port, rate / 2, tokens, seconds))
        print(f"{time.monotonic() - started_s:.0f} s in all")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    typer.run(main)
