"""The command, and one running `mxn serve` for all tests that only ask it things."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


Mxn = Callable[..., Ran]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment with caches of its own, so that tests see no model of the machine."""
    home = tmp_path_factory.mktemp("home")
    names = {"MXN_CACHE_DIR": "cache", "MXN_DATA_DIR": "data", "MXN_CONFIG_DIR": "config"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MXN_")}
    with tempfile.TemporaryDirectory(prefix="mxn-") as run:  # sockets are there, and their paths must be short
        own = {name: str(home / folder) for name, folder in names.items()} | {"MXN_RUNTIME_DIR": run}
        yield clean | own | {"MXN_LOG_LEVEL": "warning"}


@pytest.fixture(scope="session")
def mxn(environment: dict[str, str]) -> Mxn:
    """Runs `mxn ARGS` as a user does, in a process of its own."""

    def run(*args: str, stdin: str = "", timeout: float = 60, **variables: str) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "mxn.cli.main", *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment | variables,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@dataclass(frozen=True, slots=True)
class Serving:
    """A running `mxn serve --json`. `ready`: the line it printed."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]

    @property
    def url(self) -> str:
        url: str = self.ready["url"]
        return url


@pytest.fixture(scope="session")
def serve(environment: dict[str, str], model_folder: str) -> Iterator[Callable[..., Serving]]:
    """Starts `mxn serve` on the fake backend; all are killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, **variables: str) -> Serving:
        command = [sys.executable, "-m", "mxn.cli.main", "serve", *(args or (model_folder, "--backend", "fake"))]
        process = subprocess.Popen(
            [*command, "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | variables,
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            assert process.stderr is not None
            pytest.fail(process.stderr.read())
        return Serving(process, json.loads(line))

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.fixture(scope="session")
def server(serve: Callable[..., Serving]) -> Serving:
    """One server that tests share."""
    return serve()
