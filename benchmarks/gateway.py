"""What mxn's gateway adds to a request: real HTTP in front of the fake backend, which answers at once.

Prints p50 and p99 of a non-streamed request for one token at concurrency 1 and at half of the highest rate, that rate,
and streamed tokens/s at higher concurrency. The time covers everything between client and engine: HTTP, validation,
tokenizing, the hop to the replica process and back, detokenizing. Nothing is subtracted; `--floor` measures in the
same run a bare HTTP server and a bare uvicorn that answer ready-made bytes, `--litellm` its proxy before the former.
`--core 0` keeps each front process on that core and everything else on the others.

    python benchmarks/gateway.py [--model FOLDER_OR_CARD] [--requests 2000] [--floor] [--core 0]
        [--litellm VENV/bin/litellm] [--json OUT]
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer

from mxn.bench.client import CompletionsClient
from mxn.bench.environment import manifest
from mxn.bench.metrics import percentile
from mxn.cli.own_server import own_server
from mxn.cli.prepare import DEFAULT_MODEL

PROMPT = "the quick brown fox jumps over the lazy dog " * 3
HALF_LOAD_S = 10.0
START_S = 90.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A front process that is measured."""

    label: str
    url: str
    model: str
    pid: int


def main(
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used.")] = DEFAULT_MODEL,
    requests: Annotated[int, typer.Option(help="Requests for the percentiles.", min=100)] = 2000,
    floor: Annotated[bool, typer.Option("--floor", help="Measure a bare server and a bare uvicorn too.")] = False,
    litellm: Annotated[Path | None, typer.Option(help="The litellm command of its own environment.")] = None,
    core: Annotated[int | None, typer.Option(help="Core for the front process; all else goes to the others.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure what the gateway adds to a request."""
    if core is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {core})
    figures: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        bare = stack.enter_context(script("bare_server.py", "bare server"))
        arms = [stack.enter_context(mxn(model))]
        if floor:
            arms += [stack.enter_context(script("bare_uvicorn.py", "bare uvicorn")), bare]
        if litellm is not None:
            arms.append(stack.enter_context(litellm_proxy(litellm, bare)))
        for arm in arms:
            if core is not None:
                for thread in psutil.Process(arm.pid).threads():
                    os.sched_setaffinity(thread.id, {core})
            figures[arm.label] = asyncio.run(measure(arm, requests))
    for label, values in figures.items():
        print(label)
        for name, value in values.items():
            print(f"  {name:<44} {value:12,.2f}")
    if json_path:
        json_path.write_text(json.dumps({"manifest": asdict(manifest(seed=0)), "figures": figures}, indent=1) + "\n")


@contextmanager
def mxn(model: str) -> Iterator[Arm]:
    """mxn's gateway in front of one fake replica."""
    with own_server(model, ["--backend", "fake", "--max-num-seqs", "128"]) as server:
        status = httpx.get(f"{server.url}/mxn/status", trust_env=False).json()
        replica = psutil.Process(status["deployments"][0]["replicas"][0]["info"]["pid"])
        yield Arm(label="mxn", url=server.url, model=server.name, pid=replica.ppid())


@contextmanager
def script(name: str, label: str) -> Iterator[Arm]:
    """One of the servers beside this file, which prints its port."""
    command = [sys.executable, str(Path(__file__).with_name(name))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline()) if process.stdout else 0
            yield Arm(label=label, url=f"http://127.0.0.1:{port}/v1", model="bare", pid=process.pid)
        finally:
            process.terminate()


@contextmanager
def litellm_proxy(program: Path, upstream: Arm) -> Iterator[Arm]:
    """litellm's proxy with one worker in front of a server that answers at once."""
    port = 18_491
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        config = Path(folder) / "config.json"
        parameters = {"model": "text-completion-openai/bare", "api_base": upstream.url, "api_key": "none"}
        config.write_text(json.dumps({"model_list": [{"model_name": "bare", "litellm_params": parameters}]}))
        options = ["--config", str(config), "--port", str(port), "--host", "127.0.0.1", "--num_workers", "1"]
        # Without a key, as mxn and the bare servers here; it listens on loopback only.
        own = {"LITELLM_LOG": "ERROR", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
        with subprocess.Popen(
            [str(program), *options], stdout=log, stderr=log, env=environment, start_new_session=True
        ) as process:
            try:
                _wait_for(f"http://127.0.0.1:{port}/health/liveliness", process)
                listening = [c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.pid]
                yield Arm(label="litellm", url=f"http://127.0.0.1:{port}/v1", model="bare", pid=listening[0])
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)


async def measure(arm: Arm, requests: int) -> dict[str, float]:
    """Latency of single requests, the highest rate, latency at half of it, then throughput of many streams."""
    client = CompletionsClient(arm.url, model=arm.model)
    figures = await latency(client, requests)
    rate = await request_rate(client, 32, 2 * requests)
    figures["one token, not streamed, requests/s"] = rate
    figures |= await half_load(client, rate / 2)
    for concurrency in (1, 8, 32):
        figures |= await streaming(client, concurrency)
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


async def request_rate(client: CompletionsClient, concurrency: int, requests: int) -> float:
    """One-token requests, not streamed, as fast as they go."""
    numbers = iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            result = await client.complete(f"{number} {PROMPT}", 1, stream=False)
            if result.error:
                raise SystemExit(f"request failed: {result.error}")

    start_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return requests / (time.perf_counter() - start_s)


async def half_load(client: CompletionsClient, rate: float) -> dict[str, float]:
    """Latency of requests that come evenly at this rate."""
    times_ms: list[float] = []

    async def one(number: int) -> None:
        result = await client.complete(f"{number} {PROMPT}", 1, stream=False)
        if result.error:
            raise SystemExit(f"request failed: {result.error}")
        times_ms.append(1e3 * (result.end_s - result.start_s))

    start_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * HALF_LOAD_S)):
            await asyncio.sleep(max(0.0, start_s + number / rate - time.monotonic()))
            group.create_task(one(number))
    return {f"one token at half of that, p{p} ms": percentile(times_ms, p) for p in (50, 99)}


async def streaming(client: CompletionsClient, concurrency: int, num_tokens: int = 256) -> dict[str, float]:
    """Streams of many tokens; also how many pieces arrived, since fast tokens share pieces."""
    prompts = [f"{i} {PROMPT}" for i in range(2 * concurrency)]
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


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when the address answers 200."""
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise SystemExit(f"{url} did not answer within {START_S:g} s")


if __name__ == "__main__":
    typer.run(main)
