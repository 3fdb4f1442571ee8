"""An mxn server as a child process on a free loopback port, for commands that need one and were given no --url."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mxn.bench.records import Subject
from mxn.config.environment import child_environment
from mxn.errors import BackendError

STOP_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnServer:
    """A server that runs. `url` ends in /v1; `model` is the name to ask for; `folder` holds its tokenizer."""

    url: str
    model: str
    folder: str
    backend: str
    attention: str
    quantisation: str
    threads: int | None
    notes: tuple[str, ...]

    def subject(self, label: str) -> Subject:
        """What a benchmark record says of it."""
        return Subject(
            label=label,
            model=self.model,
            interface="HTTP",
            backend=self.backend,
            attention=self.attention,
            quantisation=self.quantisation,
            threads=self.threads,
            notes=self.notes,
        )


@contextmanager
def own_server(model: str, options: Sequence[str] = ()) -> Iterator[OwnServer]:
    """Starts `mxn serve MODEL OPTIONS`, waits until it is ready and ends it afterwards.

    Its progress and errors go to this process's stderr. Raises: BackendError when it ends before it is ready.
    """
    command = [sys.executable, "-m", "mxn.cli.main", "serve", model, "--port", "0", "--json", *options]
    # A group of its own: Ctrl-C reaches us only, and we end it in order.
    environment = child_environment({"MXN_LOG_LEVEL": "warning"})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise BackendError(f"the server for {model} ended with exit code {process.wait()}; its reason is above")
        ready = json.loads(line)
        first = ready["deployments"][0]
        yield OwnServer(
            url=ready["url"],
            model=first["name"],
            folder=first["folder"],
            backend=first["backend"],
            attention=first["attention"],
            quantisation=first["quantisation"],
            threads=first["threads"],
            notes=tuple(first["notes"]),
        )
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
