"""An mxn server as a child process on a free loopback port, for commands that need one and were given no --url."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from mxn.bench.arms import describe
from mxn.bench.records import Subject
from mxn.config.environment import child_environment
from mxn.errors import BackendError

STOP_S = 15.0
_FACTS = ("name", "folder", "backend", "attention", "quantisation", "program", "threads", "notes")


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnServer:
    """A server that runs. `url` ends in /v1; `name` is the model to ask for; `folder` holds its tokenizer."""

    url: str
    name: str
    folder: str
    backend: str
    attention: str
    quantisation: str
    program: str
    threads: int | None
    notes: list[str]

    def subject(self, label: str) -> Subject:
        """What a benchmark record says of it."""
        return asyncio.run(describe(self.url, label, model=self.name))


@contextmanager
def own_server(model: str, options: Sequence[str] = (), *, is_quiet: bool = False) -> Iterator[OwnServer]:
    """Starts `mxn serve MODEL OPTIONS`, waits until it is ready and ends it afterwards.

    Its progress and errors go to this process's stderr, unless is_quiet: then the error below quotes its last words.
    Raises: BackendError when it ends before it is ready.
    """
    command = [sys.executable, "-m", "mxn.cli.main", "serve", model, "--port", "0", "--json", "--until-stdin-closes"]
    # A group of its own: Ctrl-C reaches us only, and we end it in order.
    environment = child_environment({"MXN_LOG_LEVEL": "warning"})
    with tempfile.TemporaryFile("w+") as words:
        stderr = words if is_quiet else None
        process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.PIPE,  # closes with this process however it ends, and then the server ends too
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            env=environment,
        )
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                reason = _last_words(words) if is_quiet else "its reason is above"
                raise BackendError(f"the server for {model} ended with exit code {process.wait()}: {reason}")
            ready = json.loads(line)
            yield OwnServer(url=ready["url"], **{f: ready["deployments"][0][f] for f in _FACTS})
        finally:
            _stop(process)


def _last_words(words: IO[str]) -> str:
    """The error line of a server that ended."""
    words.seek(0)
    lines = [line for line in words.read().splitlines() if line.startswith("error:")]
    return lines[-1].removeprefix("error:").strip() if lines else "it gave no reason"


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
