"""An `mxn serve FILE` of its own for each scenario: process, folders, addresses, and what can be seen of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

START_S = 120.0


class FaultServer:
    """`mxn serve FILE` in a process of its own, with its state in a folder that goes with it.

    prefix: words before the command, to be set before it is started. environment: what it is started with.
    """

    def __init__(self, config: Mapping[str, Any], *, variables: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mxn-faults-")
        self.folder = Path(self._folder.name)
        self.file = self.folder / "mxn.yaml"
        self.log = self.folder / "server.log"
        self.port = _free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.base}/v1"
        self.process: subprocess.Popen[str] | None = None
        self.client = httpx.Client(timeout=10, trust_env=False)
        self.prefix: list[str] = []
        own = {"MXN_RUNTIME_DIR": str(self.folder / "run"), "MXN_DATA_DIR": str(self.folder / "data")}
        self.environment = {**os.environ, **own, "MXN_LOG_FORMAT": "json", **(variables or {})}
        self.configure(config)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Writes mxn.yaml."""
        self.file.write_text(yaml.safe_dump(dict(config)))

    def start(self) -> Self:
        """Starts it and returns when it says that it is ready. Raises: RuntimeError with its log when it is not."""
        command = [sys.executable, "-m", "mxn.cli.main", "serve", str(self.file), "--port", str(self.port), "--json"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *command],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                start_new_session=True,
            )
        if not self.process.stdout or not select.select([self.process.stdout], [], [], START_S)[0]:
            raise RuntimeError(f"the server was not ready within {START_S:g} s:\n{self.last_words()}")
        if not self.process.stdout.readline():
            raise RuntimeError(f"the server ended with exit code {self.process.wait()}:\n{self.last_words()}")
        return self

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-3000:]

    @property
    def pid(self) -> int:
        if self.process is None:
            raise RuntimeError("the server was not started")
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the control process."""
        os.kill(self.pid, number)

    def mxn(self, *args: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs an mxn command."""
        return subprocess.run(
            [sys.executable, "-m", "mxn.cli.main", *args],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment,
            check=False,
        )

    # ------------------------------------------------------------------ what can be seen

    def status(self) -> dict[str, Any]:
        """The answer of /v1/mxn/status."""
        found: dict[str, Any] = self.client.get(f"{self.base}/v1/mxn/status").raise_for_status().json()
        return found

    def replicas(self, model: str | None = None) -> list[dict[str, Any]]:
        """All replicas of a model, or of all."""
        return [r for d in self.status()["deployments"] if model in (None, d["model"]) for r in d["replicas"]]

    def ready_pids(self) -> list[int]:
        """Processes of the replicas that are ready."""
        return [replica["info"]["pid"] for replica in self.replicas() if replica["is_ready"]]

    def num_restarts(self) -> int:
        """Starts of replicas beyond the first of each."""
        return sum(deployment["num_restarts"] for deployment in self.status()["deployments"])

    def metrics(self) -> dict[str, float]:
        """Sums over all labels, by name of the sample."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.client.get(f"{self.base}/metrics").text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def held(self) -> dict[str, float]:
        """What requests hold: blocks, sequences, the gateway's requests, connections and file descriptors."""
        stats = [deployment["stats"] for deployment in self.status()["deployments"]]
        process = psutil.Process(self.pid)
        connections = process.net_connections(kind="tcp")
        return {
            "KV blocks": sum(s["num_total_blocks"] - s["num_free_blocks"] for s in stats),
            "sequences": sum(s["num_running"] + s["num_waiting"] for s in stats),
            "sockets": sum(c.status == psutil.CONN_ESTABLISHED for c in connections),
            "file descriptors": process.num_fds(),
        }

    def memory_mib(self) -> dict[str, float]:
        """Resident memory of the gateway and of all replicas."""
        replicas = sum(psutil.Process(pid).memory_info().rss for pid in self.ready_pids())
        return {"gateway": psutil.Process(self.pid).memory_info().rss / 2**20, "replicas": replicas / 2**20}

    # ------------------------------------------------------------------ the end

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self.stop()
        finally:
            self.close()

    def close(self) -> None:
        """Ends what is left of it: replicas outlive a gateway that was killed, for the next one."""
        for process in _processes_with(f"MXN_RUNTIME_DIR={self.folder / 'run'}"):
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process is not None and self.process.stdout is not None:
            self.process.wait()
            self.process.stdout.close()
        self.client.close()
        self._folder.cleanup()


def wait_until(condition: Callable[[], object], timeout_s: float, tick_s: float = 0.05) -> float | None:
    """Seconds until the condition held; None when it did not in time. A server that does not answer counts as no."""
    began_s = time.monotonic()
    while (passed_s := time.monotonic() - began_s) < timeout_s:
        with contextlib.suppress(httpx.HTTPError, psutil.Error):
            if condition():
                return passed_s
        time.sleep(tick_s)
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _processes_with(variable: str) -> Iterator[psutil.Process]:
    """Processes that carry this environment variable: those that a scenario's server started."""
    wanted = variable.encode()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                yield process
