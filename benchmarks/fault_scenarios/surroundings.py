"""What happens around a server: signals, bad files, a full disk, a clock that jumps."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from fault_scenarios.load import Load
from fault_scenarios.report import Report
from fault_scenarios.server import FaultServer, wait_until
from fault_scenarios.setup import MODEL, Setup

_CLOCK = '''
"""Loaded by every Python process of the server: the wall clock is off by what a file says."""
import os
import time

_real = time.time


def _offset():
    try:
        with open(os.environ["MXN_FAULTS_CLOCK"]) as file:
            return float(file.read() or 0)
    except (OSError, ValueError):
        return 0.0


time.time = lambda: _real() + _offset()
time.time_ns = lambda: int(1e9 * time.time())
'''


async def sigterm(setup: Setup) -> Report:
    """SIGTERM under load."""
    report = Report()
    with FaultServer(setup.replicas(2)) as server:
        load = Load(server.url, MODEL, num_clients=16, num_tokens=300)
        await load.learn()
        async with load.running():
            await asyncio.sleep(setup.seconds(3))
            server.signal(signal.SIGTERM)
            struck_s = time.monotonic()
            process = server.process
            code = await asyncio.to_thread(process.wait, 60) if process is not None else None
            took_s = time.monotonic() - struck_s
        begun = [answer for answer in load.answers if answer.begin_s < struck_s - 0.05]
        report.equal("requests that had begun, lost", sum(a.outcome not in ("ok",) for a in begun), 0)
        report.equal("exit code", code if code is not None else "none", 0)
        report.at_most("seconds it took", took_s, 30)
        report.figures["in work when the signal came"] = sum(a.end_s > struck_s for a in begun)
        report.figures["requests"] = len(begun)
        report.figures["seconds it took"] = round(took_s, 2)
    return report


async def bad_yaml(setup: Setup) -> Report:
    """The file is broken, then applied, and then SIGHUP comes."""
    report = Report()
    config = setup.replicas(1)
    with FaultServer(config) as server:
        before = server.ready_pids()
        load = Load(server.url, MODEL, num_clients=4)
        await load.learn()
        async with load.running():
            await asyncio.sleep(1)
            for name, text in (
                ("no YAML", "deployments: [\n  - {name: m"),
                ("an unknown key", server.file.read_text() + "deploymentss: []\n"),
                ("a model that is not there", server.file.read_text().replace(setup.model, "/no/such/model")),
            ):
                server.file.write_text(text)
                applied = await asyncio.to_thread(server.mxn, "apply", str(server.file), "--url", server.base)
                report.equal(f"mxn apply, {name}: refused", applied.returncode in (1, 2), True)
                said = (applied.stderr.strip().splitlines() or ["nothing"])[0].replace(f"{server.folder}/", "")
                report.notes.append(f"{name}: {said[:160]}")
                server.signal(signal.SIGHUP)
                await asyncio.sleep(1.5)
                server.configure(config)
            report.equal("still serves", server.process is not None and server.process.poll() is None, True)
        report.equal("the same process serves", server.ready_pids() == before, True)
        _count(report, load)
    return report


async def full_disk(setup: Setup) -> Report:
    """The disk with state, logs and cache is full; then a replica dies."""
    report = Report()
    tool = shutil.which("unshare")
    server = FaultServer(setup.replicas(2))
    run = server.folder / "run"
    run.mkdir(mode=0o700)
    script = f'mount -t tmpfs -o size=1m,mode=0700 tmpfs {run} && exec "$@"'
    server.prefix = [tool or "unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if tool is None or subprocess.run([*server.prefix, "true"], capture_output=True, check=False).returncode:
        server.close()
        report.skip("a file system of its own cannot be mounted here")
        return report
    with server:
        load = Load(server.url, MODEL, num_clients=8)
        await load.learn()
        async with load.running():
            await asyncio.sleep(1)
            num_bytes = _fill(Path(f"/proc/{server.pid}/root{run}"))
            await asyncio.sleep(setup.seconds(2))
            victim = server.ready_pids()[0]
            os.kill(victim, signal.SIGKILL)

            def is_whole() -> bool:
                pids = server.ready_pids()
                return len(pids) == 2 and victim not in pids

            back_s = await asyncio.to_thread(wait_until, is_whole, 30)
            await asyncio.sleep(setup.seconds(2))
        _count(report, load)
        report.at_most("seconds until the replica that died was back", back_s, 10)
        report.figures["bytes that filled it"] = num_bytes
    return report


async def clock(setup: Setup) -> Report:
    """The wall clock jumps an hour on, and then two back."""
    report = Report()
    server = FaultServer(setup.replicas(1))
    offset, site = server.folder / "clock", server.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_CLOCK)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    server.environment |= {"PYTHONPATH": os.pathsep.join(paths), "MXN_FAULTS_CLOCK": str(offset)}
    with server:
        load = Load(server.url, MODEL, num_clients=16)
        await load.learn()
        pids = server.ready_pids()
        async with load.running():
            await asyncio.sleep(setup.seconds(6))
            steps_s = []
            for seconds in (3600, -3600):
                offset.write_text(str(seconds))
                steps_s.append(time.monotonic())
                await asyncio.sleep(setup.seconds(6))
        told_s = server.client.post(f"{server.url}/completions", json={"model": MODEL, "prompt": "x"}).json()["created"]
        report.at_most("the server believes it is an hour ago, off by s", abs(told_s - (time.time() - 3600)), 5)
        _count(report, load)
        report.equal("the same replica serves", server.ready_pids() == pids, True)
        before_s = load.latency_s(99, until_s=steps_s[0] - 1)
        after_s = load.latency_s(99, since_s=steps_s[0] - 1)
        report.at_most("p99 since, as a multiple of before", after_s / before_s, 2)
        negative = sorted(name for name, value in server.metrics().items() if value < 0)
        report.equal("negative metrics", ", ".join(negative) or "none", "none")
    return report


def _fill(folder: Path) -> int:
    """Writes into a folder until nothing goes in any more."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return file.tell()


def _count(report: Report, load: Load) -> None:
    report.equal("requests lost", load.count("refused", "broken", "reset"), 0)
    report.equal("answers with another text", load.count("different"), 0)
    report.figures["requests"] = len(load.answers)
    report.notes += load.details()
