"""A server's process: started under a warden, awaited, its last lines kept, ended with the replica."""

from __future__ import annotations

import logging
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import httpx

from mxn.backends.base import ServerSpec
from mxn.config.environment import child_environment
from mxn.errors import BackendError, ServerDiedError

log = logging.getLogger("mxn.server_process")

_WARDEN = Path(__file__).with_name("warden.py")
_LINES_KEPT = 400
_LAST_LINES = 8
_POLL_S = 0.1
_CALL_S = 5.0
_WARDEN_S = 5.0  # that the warden may take beyond the time the server was given to stop
_ERROR = re.compile(r"(?:\b[A-Za-z_.]*(?:Error|Exception)|\b(?:error|fatal|FATAL|ERROR|panicked))\b.*[:(]")
_POINTS_ELSEWHERE = re.compile(r"see (?:root cause|above|the stack trace)", re.IGNORECASE)


class ServerProcess:
    """The server a `ServerSpec` describes. Made by the constructor, usable after `wait_until_ready`, ended by `stop`.

    url: where it listens, without a path. headers: what every request to it carries.
    on_exit: called once from another thread when it ended though nobody asked it to.
    """

    def __init__(self, spec: ServerSpec) -> None:
        """Starts it. Nothing is started for a spec without argv."""
        self._spec = spec
        values = {"{key}": secrets.token_hex(16)}
        texts = (*spec.argv, *(value for _, value in spec.environment), spec.url)
        if any("{port}" in text for text in texts):
            values["{port}"] = str(_free_port())
        self.url = _fill(spec.url, values)
        self.name = Path(spec.argv[0]).name if spec.argv else self.url
        key = _fill(spec.api_key, values)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(headers=self.headers, trust_env=False, timeout=_CALL_S)
        self.on_exit: Callable[[], None] | None = None
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._is_ready = False
        self._is_stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._exited = threading.Event()
        if not spec.argv:
            return
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(_WARDEN),
                str(spec.stop_timeout_s),
                *(_fill(a, values) for a in spec.argv),
            ],
            stdin=subprocess.PIPE,  # closes with this process however it ends, and then the warden ends the server
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment({name: _fill(value, values) for name, value in spec.environment}),
            start_new_session=True,
        )
        for target in (self._read_lines, self._wait):
            self._threads.append(threading.Thread(target=target, name="server", daemon=True))
            self._threads[-1].start()

    @property
    def is_own(self) -> bool:
        """True when this replica started it."""
        return self._process is not None

    @property
    def has_exited(self) -> bool:
        """True when a server that was started runs no more."""
        return self._exited.is_set()

    def wait_until_ready(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Returns when the server answers its readiness path with 200.

        Raises: BackendError with its last lines when it ends first, takes too long, or is not wanted any more; it has
        been stopped then.
        """
        spec = self._spec
        deadline_s = time.monotonic() + spec.ready_timeout_s
        said = "no connection"
        try:
            while not self._exited.wait(_POLL_S):
                try:
                    response = self._http.get(self.url + spec.ready_path)
                    said = f"HTTP {response.status_code}"
                    if response.status_code == 200:
                        self._is_ready = True
                        return
                except httpx.HTTPError as error:
                    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                if not is_wanted():
                    self.stop()
                    raise BackendError(f"nobody waits for {self.name} any more")
                if time.monotonic() > deadline_s:
                    break
        except httpx.InvalidURL as error:
            raise BackendError(f"{self.url!r} is not a server's address; expected http://HOST:PORT") from error
        if self._exited.is_set():
            raise BackendError(self.epitaph())
        self.stop()
        raise BackendError(
            f"{self.name} was not ready after {spec.ready_timeout_s:g} s (GET {self.url}{spec.ready_path}: {said}) "
            f"and was given up{self._last_lines()}"
        )

    def served_models(self) -> dict[str, int | None]:
        """Names that GET /v1/models lists, each with the context length if it is told; empty when it tells nothing."""
        try:
            response = self._http.get(f"{self.url}/v1/models")
            listed = response.json()["data"] if response.status_code == 200 else []
            return {one["id"]: one.get("max_model_len") for one in listed}
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def is_answering(self) -> bool:
        """True when the readiness path answers with 200 now."""
        try:
            return self._http.get(self.url + self._spec.ready_path).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_for_exit(self, seconds: float) -> bool:
        """True when the process has ended, after waiting for that at most so long."""
        return self._process is not None and self._exited.wait(seconds)

    def died(self) -> ServerDiedError:
        """The error that says how it ended."""
        return ServerDiedError(self.epitaph())

    def epitaph(self) -> str:
        """How it ended, the line that most likely names the cause, and its last lines."""
        code = self._process.returncode if self._process is not None else None
        how = "was lost" if code is None else f"ended with signal {code - 128}" if code > 128 else f"exit code {code}"
        how = how if code is None or code > 128 else f"ended with {how}"
        cause = root_cause(list(self._lines))
        return f"{self.name} {how}{f': {cause}' if cause else ''}{self._last_lines()}"

    def stop(self) -> None:
        """Asks it to stop, kills it after its time, returns when all its processes are gone. Safe to call twice."""
        self._is_stopping = True
        self._http.close()
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not self._exited.wait(self._spec.stop_timeout_s + _WARDEN_S):
            self._process.kill()
        for thread in self._threads:
            thread.join(1.0)
        if self._process.stdout is not None and not self._threads[0].is_alive():
            self._process.stdout.close()

    def _last_lines(self) -> str:
        lines = [line for line in self._lines if line.strip()][-_LAST_LINES:]
        return f"; its last lines: {' | '.join(lines)}" if lines else "; it said nothing" if self._process else ""

    def _read_lines(self) -> None:
        stdout = self._process.stdout if self._process is not None else None
        for raw in stdout or ():
            line = raw.decode(errors="replace").rstrip()
            self._lines.append(line)
            log.log(logging.DEBUG if self._is_ready else logging.INFO, "%s: %s", self.name, line)

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._threads[0].join(1.0)  # its last words
        self._exited.set()
        if self.on_exit is not None and not self._is_stopping:
            self.on_exit()


def root_cause(lines: list[str]) -> str:
    """The first line that names an error and does not point elsewhere; empty when there is none.

    When one process of several fails, the others report that it failed, and what is printed last is not the cause.
    """
    for line in lines:
        if _ERROR.search(line) and not _POINTS_ELSEWHERE.search(line):
            return line.strip()[:500]
    return ""


def _fill(text: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
