"""Clients that leave, come in crowds, or read a byte a second."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter

from fault_scenarios.load import Load
from fault_scenarios.report import Report
from fault_scenarios.server import FaultServer, wait_until
from fault_scenarios.setup import MODEL, Setup
from mxn.bench.client import CompletionsClient
from mxn.bench.metrics import percentile

QUEUE = 64


async def disconnects(setup: Setup) -> Report:
    """10,000 clients leave in the middle of their answer, streamed and not."""
    report = Report()
    total = setup.count(10_000, at_least=200)
    kv_gib = 0.00025 if setup.is_fake else 0.05  # a cache that is full of prefixes before memory is looked at
    with FaultServer(setup.config(setup.deployment(step_ms=2, kv_gib=kv_gib))) as server:
        await _leave(server, max(200, total // 10), seed=1)  # so that memory that is taken once has been
        wait_until(lambda: not server.held()["sequences"], 60)
        await asyncio.sleep(2)
        before, memory = server.held(), server.memory_mib()
        began_s = time.monotonic()
        sent = await _leave(server, total, seed=2)
        took_s = time.monotonic() - began_s
        wait_until(lambda: server.held() == before, 15)
        after, now_mib = server.held(), server.memory_mib()
        for name, held in before.items():
            report.equal(f"{name} leaked", after[name] - held, 0)
        for name, mib in memory.items():
            report.at_most(f"memory of the {name}, growth in %", 100 * (now_mib[name] / mib - 1), 5)
        report.figures |= {"clients": total, "seconds": round(took_s, 1), "left in mid-stream": sent["late"]}
        report.figures["sequences aborted"] = server.metrics()["mxn_engine_sequences_aborted_total"]
        report.figures["memory before, MiB"] = {name: round(mib, 1) for name, mib in memory.items()}
        report.figures["memory after, MiB"] = {name: round(mib, 1) for name, mib in now_mib.items()}
        load = Load(server.url, MODEL, num_clients=4)
        await load.learn()
        async with load.running():
            await asyncio.sleep(1)
        report.equal("answers right afterwards", load.count("ok"), len(load.answers))
    return report


async def overload(setup: Setup) -> Report:
    """Twice and ten times as many requests come as can be served."""
    report = Report()
    config = setup.config(setup.deployment(step_ms=10, max_num_seqs=8, max_queue=QUEUE))
    with FaultServer(config) as server:
        peak, own_s = await _peak(server, setup)
        limit_s = (QUEUE + 8) / peak + own_s
        report.figures |= {"peak goodput, requests/s": round(peak, 1), "p50 s at the peak": round(own_s, 3)}
        report.figures["queue limit, s"] = round(limit_s, 2)
        for factor in (2, 10):
            found = await _offer(server, factor * peak, setup.seconds(60, at_least=8))
            name = f"{factor} times the peak"
            report.at_least(f"{name}: goodput, share of the peak", found["goodput"] / peak, 0.95)
            report.equal(f"{name}: neither answered nor 429", found["other"], 0)
            report.at_most(f"{name}: p99 of the accepted, s", found["p99_s"], limit_s)
            report.figures[name] = {key: round(value, 3) for key, value in found.items()}
        wait_until(lambda: not server.held()["sequences"], 30)
        report.equal("sequences left afterwards", server.held()["sequences"], 0)
    return report


async def slow_readers(setup: Setup) -> Report:
    """Clients read a byte a second."""
    report = Report()
    count = setup.count(50, at_least=20)
    # One more than there are slow ones, so that the others still have a place in every step.
    fields = {**({"kv_gib": 0.01} if setup.is_fake else {}), "max_num_seqs": count + 16}
    num_tokens = 7000 if setup.is_fake else 900
    with FaultServer(setup.config(setup.deployment(step_ms=2, **fields))) as server:
        load = Load(server.url, MODEL, num_clients=2, num_tokens=50)
        await load.learn()
        async with load.running():
            await asyncio.sleep(setup.seconds(5))
        alone_s, load.answers = load.longest_gap_s(), []
        before = server.memory_mib()["gateway"]
        stop = asyncio.Event()
        readers = [asyncio.create_task(_read_slowly(server, num_tokens, stop)) for _ in range(count)]
        highest = before
        async with load.running():
            end_s = time.monotonic() + setup.seconds(60, at_least=5)
            while time.monotonic() < end_s:
                await asyncio.sleep(0.5)
                highest = max(highest, server.memory_mib()["gateway"])
        num_open = server.held()["sockets"]
        stop.set()
        await asyncio.gather(*readers)
        report.at_most("memory of the gateway per slow client, KiB", 1024 * (highest - before) / count, 512)
        report.equal("answers of the others lost or different", len(load.answers) - load.count("ok"), 0)
        report.figures |= {"slow clients": count, "requests of the others": len(load.answers)}
        report.figures["connections that the gateway still held at the end, all clients"] = num_open
        report.figures["longest gap in a stream of the others, s"] = round(load.longest_gap_s(), 3)
        report.figures["the same before, s"] = round(alone_s, 3)
        report.notes += load.details()
        wait_until(lambda: not server.held()["sequences"], 60)
        report.equal("sequences left afterwards", server.held()["sequences"], 0)
    return report


async def _leave(server: FaultServer, total: int, *, seed: int) -> Counter[str]:
    """So many clients ask and close the connection a moment later; every second one streams."""
    chance, done = random.Random(seed), Counter[str]()
    gate = asyncio.Semaphore(64)

    async def one(number: int) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(_request(f"client {number} of {seed}", 500, stream=number % 2 == 0))
            patience_s = 30 if number % 4 == 0 else chance.uniform(0, 0.2)  # some are there when the stream begins
            try:
                await asyncio.wait_for(reader.read(1 << 16), patience_s)
                done["late"] += 1
            except TimeoutError:
                done["early"] += 1
            finally:
                writer.transport.abort()

    await asyncio.gather(*(one(number) for number in range(total)))
    return done


async def _peak(server: FaultServer, setup: Setup) -> tuple[float, float]:
    """Requests/s of as many clients as there are places in a step, and what one then takes (p50 s)."""
    client = CompletionsClient(server.url, model=MODEL)
    try:
        await client.run(_prompts(40), 20, 8)
        began_s = time.monotonic()
        results = []
        while time.monotonic() - began_s < setup.seconds(15, at_least=5):
            results += await client.run(_prompts(80), 20, 16)
        took_s = time.monotonic() - began_s
        return len(results) / took_s, percentile([r.end_s - r.start_s for r in results], 50)
    finally:
        client.close()


async def _offer(server: FaultServer, rate: float, seconds: float) -> dict[str, float]:
    """Requests at a steady rate, whatever becomes of them. Goodput counts answers that ended within the time."""
    client = CompletionsClient(server.url, model=MODEL)
    tasks: set[asyncio.Task[None]] = set()
    kinds: Counter[str] = Counter()
    times: list[float] = []
    begin_s = time.monotonic()
    num_in_time = 0

    async def one(number: int) -> None:
        nonlocal num_in_time
        result = await client.complete(f"{number} comes in a crowd", 20, stream=number % 2 == 0)
        kinds[result.error_kind or "ok"] += 1
        if result.error is None:
            times.append(result.end_s - result.start_s)
            num_in_time += result.end_s <= begin_s + seconds

    number = 0
    while (now_s := time.monotonic()) < begin_s + seconds:
        while number < rate * (now_s - begin_s):
            task = asyncio.create_task(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    client.close()
    return {
        "offered, requests/s": number / seconds,
        "goodput": num_in_time / seconds,
        "answered": kinds["ok"],
        "refused with 429": kinds["http_429"],
        "other": sum(kinds.values()) - kinds["ok"] - kinds["http_429"],
        "p50_s": percentile(times, 50),
        "p99_s": percentile(times, 99),
    }


async def _read_slowly(server: FaultServer, num_tokens: int, stop: asyncio.Event) -> None:
    """One client with a small buffer that takes a byte a second of a long answer."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(raw, ("127.0.0.1", server.port))
        await loop.sock_sendall(raw, _request("tell a long story", num_tokens, stream=True))
        while not stop.is_set():
            if not await asyncio.wait_for(loop.sock_recv(raw, 1), 10):
                break
            await asyncio.sleep(1)
    except (OSError, TimeoutError):
        pass  # the server has ended it
    finally:
        raw.close()


def _request(prompt: str, num_tokens: int, *, stream: bool) -> bytes:
    fields = {"model": MODEL, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": stream}
    body = json.dumps(fields).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _prompts(count: int) -> list[str]:
    return [f"{number} comes in its turn" for number in range(count)]
