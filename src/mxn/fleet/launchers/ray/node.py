"""This machine as a node of a Ray cluster: its head, or a further one. Ends with this process, kill -9 included."""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from mxn.config.environment import child_environment, data_dir, set_variables, variable
from mxn.engine.proxy import warden
from mxn.errors import BackendError
from mxn.fleet.ray_inventory import NODE_LABEL

_GRACE_S = 10.0
_START_S = 120.0
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 128 << 20
"""Nothing of mxn goes through Ray's object store, which would take a third of the memory otherwise."""


class RayNode:
    """The processes of one node. A context that stops them."""

    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self.address = address
        self._process = process

    @classmethod
    def head(cls, resources: Mapping[str, float]) -> Self:
        """A cluster of this machine alone: on the loopback address, its dashboard too, with token authentication."""
        use_token()
        # Without this Ray takes the machine's outer address for its own, even when told the loopback address.
        set_variables(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        port, dashboard = _free_port(), _free_port()
        address = f"{_LOOPBACK}:{port}"
        options = [
            *("--head", f"--port={port}", f"--node-ip-address={_LOOPBACK}"),
            *(f"--dashboard-host={_LOOPBACK}", f"--dashboard-port={dashboard}"),
            f"--ray-client-server-port={_free_port()}",
        ]
        return cls(address, _start(options, resources))._until_up()

    @classmethod
    def joining(cls, address: str, resources: Mapping[str, float]) -> Self:
        """A further node of the cluster whose head is at `address`; that cluster's token must be there."""
        set_variables(RAY_AUTH_MODE="token")
        return cls(address, _start([f"--address={address}"], resources))._until_up()

    def wait(self) -> int:
        """Returns the exit code when the node has ended."""
        return self._process.wait()

    def stop(self) -> None:
        """Ends every process of the node."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # which is what the warden waits for
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _until_up(self) -> Self:
        """Raises: BackendError with Ray's last words when it ends instead."""
        words: deque[str] = deque(maxlen=5)
        give_up_s = time.monotonic() + _START_S
        for raw in self._process.stdout or ():
            line = raw.decode(errors="replace").strip()
            if "Ray runtime started" in line:
                threading.Thread(target=self._drain, name="ray", daemon=True).start()
                return self
            if line:
                words.append(line)
            if time.monotonic() > give_up_s:
                break
        self.stop()
        raise BackendError(f"Ray did not start: {' | '.join(words) or 'it said nothing'}")

    def _drain(self) -> None:
        for _ in self._process.stdout or ():
            pass


def use_token() -> None:
    """Switches Ray's token authentication on for this process and those it starts, with a token of this user's own."""
    set_variables(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0")
    if variable("RAY_AUTH_TOKEN") or variable("RAY_AUTH_TOKEN_PATH"):
        return
    path = data_dir() / "ray-token"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    set_variables(RAY_AUTH_TOKEN_PATH=str(path))


def _start(options: list[str], resources: Mapping[str, float]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
    command += [f"--resources={json.dumps(dict(resources))}", f"--labels={NODE_LABEL}={_host_name()}"]
    command += [f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(warden.__file__)), str(_GRACE_S), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=child_environment({"PYTHONUNBUFFERED": "1"}),
        start_new_session=True,  # Ctrl-C reaches mxn alone, which ends the node after what is on it
    )


def _host_name() -> str:
    """As a label may hold it."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in platform.node())[:63].strip("-_.") or "node"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
