"""Replicas that die, hang, lose their chip or cannot load, and a control process that is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time

import psutil

from fault_scenarios.load import Load
from fault_scenarios.report import Report
from fault_scenarios.server import FaultServer, wait_until
from fault_scenarios.setup import MODEL, Setup
from mxn.store.fetch import fetch


async def kill(setup: Setup) -> Report:
    """kill -9 one of two replicas under load."""
    report = Report()
    with FaultServer(setup.replicas(2)) as server:
        load = await _loaded(server, num_clients=16)
        async with load.running():
            await asyncio.sleep(setup.seconds(3))
            victim = server.ready_pids()[0]
            struck_s = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            back_s = await asyncio.to_thread(wait_until, lambda: _is_whole(server, 2, without=victim), 60)
            await asyncio.sleep(setup.seconds(5))
        _count(report, load)
        report.at_most("seconds to full capacity", back_s, 10)
        report.figures["requests in the 5 s before the kill ended as usual, p99 s"] = load.latency_s(
            99, until_s=struck_s - 1
        )
        report.figures["requests in work when it was killed, p99 s"] = load.latency_s(
            99, since_s=struck_s - 2, until_s=struck_s
        )
        report.figures["longest gap in a stream, s"] = load.longest_gap_s()
    return report


async def hang(setup: Setup) -> Report:
    """SIGSTOP one of two replicas under load."""
    report = Report()
    with FaultServer(setup.replicas(2)) as server:
        load = await _loaded(server, num_clients=16)
        async with load.running():
            await asyncio.sleep(setup.seconds(3))
            victim = server.ready_pids()[0]
            os.kill(victim, signal.SIGSTOP)
            fenced_s = await asyncio.to_thread(wait_until, lambda: not _is_alive(victim), 60)
            back_s = await asyncio.to_thread(wait_until, lambda: _is_whole(server, 2, without=victim), 60)
            await asyncio.sleep(setup.seconds(3))
        _count(report, load)
        report.at_most("seconds until it was fenced", fenced_s, 5)
        report.figures["seconds from there to full capacity"] = back_s
        report.figures["longest gap in a stream, s"] = load.longest_gap_s()
    return report


async def saturation(setup: Setup) -> Report:
    """Both replicas, and every core of the machine, are kept busy: nobody hangs, so nobody may be fenced."""
    report = Report()
    with FaultServer(setup.replicas(2, step_ms=0)) as server:
        load = await _loaded(server, num_clients=48)
        before = server.ready_pids()
        psutil.cpu_percent()
        async with load.running():
            await asyncio.sleep(setup.seconds(600))
            busy = psutil.cpu_percent()
        _count(report, load)
        report.equal("replicas fenced", server.num_restarts(), 0)
        report.equal("the same processes serve", sorted(server.ready_pids()) == sorted(before), True)
        report.figures["machine busy, %"] = busy
        report.figures["seconds"] = setup.seconds(600)
    return report


async def control(setup: Setup) -> Report:
    """kill -9 the control process and start it again."""
    report = Report()
    with FaultServer(setup.replicas(2)) as server:
        load = await _loaded(server, num_clients=8)
        before = server.ready_pids()
        async with load.running():
            await asyncio.sleep(setup.seconds(2))
            server.signal(signal.SIGKILL)
            struck_s = time.monotonic()
            await asyncio.to_thread(server.start)
            ready_s = time.monotonic() - struck_s
            await asyncio.to_thread(wait_until, lambda: _is_whole(server, 2), 60)
            await asyncio.sleep(setup.seconds(3))
        first_s = min((a.end_s for a in load.answers if a.outcome == "ok" and a.begin_s > struck_s), default=None)
        report.at_most("seconds to the first answer", None if first_s is None else first_s - struck_s, 5)
        report.equal("replicas taken over", sum(pid in before for pid in server.ready_pids()), 2)
        report.equal("answers with another text", load.count("different"), 0)
        report.figures["seconds until it said it was ready"] = ready_s
        report.figures["requests cut off with their gateway"] = load.count("reset", "broken", "refused")
        report.figures["requests"] = len(load.answers)
    return report


async def chip(setup: Setup) -> Report:
    """A chip disappears; there is another one."""
    report = Report()
    if not setup.is_fake:
        report.skip("only a simulated chip can be taken away")
        return report
    server = FaultServer({}, variables={"MXN_FAKE_CHIPS": "simulated,simulated"})
    lost = server.folder / "lost"
    server.configure(setup.replicas(1, options={"lost_chip_file": str(lost)}))
    with server:
        load = await _loaded(server, num_clients=8)
        async with load.running():
            await asyncio.sleep(setup.seconds(2))
            [uid] = server.replicas(MODEL)[0]["chips"]
            lost.write_text(uid)

            def is_elsewhere() -> bool:
                return any(r["is_ready"] and uid not in r["chips"] for r in server.replicas(MODEL))

            moved_s = await asyncio.to_thread(wait_until, is_elsewhere, 30)
            await asyncio.sleep(setup.seconds(2))
        _count(report, load)
        report.at_most("seconds until it runs on the other chip", moved_s, 3)
        found = next((c for c in server.status()["chips"] if c["uid"] == uid), {"state": "not told", "reason": ""})
        report.equal("state of the chip", found["state"], "lost")
        report.figures["reason told"] = found["reason"]
        report.figures["longest answer, s"] = load.latency_s(100)
    return report


async def weights(setup: Setup) -> Report:
    """The weights of one of two models are cut short."""
    report = Report()
    good, bad = setup.deployment(MODEL), setup.deployment("broken")
    if setup.is_fake:
        bad["options"] = {"fail_load": "model.safetensors: the file ends before its last tensor"}
    server = FaultServer(setup.config(good, bad))
    if not setup.is_fake:
        folder = server.folder / "broken"
        shutil.copytree(fetch(setup.model).folder, folder)
        path = folder / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        server.configure(setup.config(good, {**bad, "model": str(folder)}))
    with server:
        load = await _loaded(server, num_clients=4)
        async with load.running():
            await asyncio.sleep(setup.seconds(3))
        _count(report, load)
        broken = next(d for d in server.status()["deployments"] if d["model"] == "broken")
        report.equal("the broken model is", broken["state"], "failed")
        report.equal("readiness, HTTP status", server.client.get(f"{server.base}/readyz").status_code, 200)
        asked = server.client.post(f"{server.url}/completions", json={"model": "broken", "prompt": "x"})
        report.equal("who asks for it gets HTTP status", asked.status_code, 503)
        report.figures["reason told"] = broken["reason"]
    return report


async def _loaded(server: FaultServer, *, num_clients: int) -> Load:
    load = Load(server.url, MODEL, num_clients=num_clients)
    await load.learn()
    return load


def _count(report: Report, load: Load) -> None:
    """No request may be lost, and every answer must be the one of an undisturbed server."""
    report.equal("requests lost", load.count("refused", "broken", "reset"), 0)
    report.equal("answers with another text", load.count("different"), 0)
    report.figures["requests"] = len(load.answers)
    report.figures["of them streamed"] = sum(answer.is_streamed for answer in load.answers)
    report.notes += load.details()


def _is_whole(server: FaultServer, count: int, *, without: int | None = None) -> bool:
    pids = server.ready_pids()
    return len(pids) == count and without not in pids


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
