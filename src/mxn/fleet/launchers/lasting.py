"""A replica process that outlives the gateway that started it: its log in a file, its end seen by who took it over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from pathlib import Path

from mxn.engine.door import peer_of
from mxn.errors import BackendError
from mxn.fleet.state import ReplicaRecord, process_start

log = logging.getLogger(__name__)

_READ_PERIOD_S = 0.25
_LOOK_PERIOD_S = 0.2
_MAX_LOG_BYTES = 1 << 20
"""A log file is emptied once so much of it has been read."""
UNKNOWN_EXIT = 255
"""Return code of a process that ended and was no child of this one."""


class LogTail:
    """Passes a log file on, as it grows, to a reader that sees it as a pipe."""

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self.reader = asyncio.StreamReader()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._offset = os.fstat(self._file).st_size if from_end else 0
        self._task = asyncio.create_task(self._follow())
        self._is_over = False

    @property
    def fileno(self) -> int:
        """What a process gets as its stderr."""
        return self._file

    async def finish(self) -> None:
        """Passes on what is left, then the end; called when the process has ended."""
        if self._is_over:
            return
        self._is_over = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._pass_on()
        os.close(self._file)
        self.reader.feed_eof()

    async def _follow(self) -> None:
        while True:
            self._pass_on()
            await asyncio.sleep(_READ_PERIOD_S)

    def _pass_on(self) -> None:
        while data := os.pread(self._file, 1 << 16, self._offset):
            self._offset += len(data)
            self.reader.feed_data(data)
        if self._offset > _MAX_LOG_BYTES:
            os.ftruncate(self._file, 0)
            self._offset = 0


class StartedProcess:
    """A child of this gateway whose log is a file."""

    def __init__(self, process: asyncio.subprocess.Process, tail: LogTail) -> None:
        self._process = process
        self._tail = tail

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def stderr(self) -> asyncio.StreamReader:
        return self._tail.reader

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        code = await self._process.wait()
        await self._tail.finish()
        return code


class AdoptedProcess:
    """A process that an earlier gateway started. Signals can reach no other, even when its pid was given away again."""

    def __init__(self, record: ReplicaRecord, tail: LogTail) -> None:
        """Raises: BackendError when the process that the record names runs no more."""
        self.pid = record.pid
        self.returncode: int | None = None
        self._started = record.started
        self._tail = tail
        self._was_killed = False
        self._handle = _handle_of(record)

    @property
    def stderr(self) -> asyncio.StreamReader:
        return self._tail.reader

    def kill(self) -> None:
        if self.returncode is None:
            self._was_killed = True
            _send_signal(self._handle, self.pid, self._started, signal.SIGKILL)

    async def wait(self) -> int:
        while self.returncode is None and process_start(self.pid) == self._started:
            await asyncio.sleep(_LOOK_PERIOD_S)
        if self.returncode is None:
            self.returncode = -signal.SIGKILL if self._was_killed else UNKNOWN_EXIT
            if self._handle is not None:
                os.close(self._handle)
        await self._tail.finish()
        return self.returncode


async def connect(folder: Path, record: ReplicaRecord) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the process that the record names. Raises: BackendError when another or none answers."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, str(folder / record.socket))
        except OSError as error:
            raise BackendError(f"replica {record.pid} does not answer: {error.strerror or error}") from error
        peer = peer_of(connection)
        if peer is not None and peer != (record.pid, os.getuid()):
            raise BackendError(f"replica {record.pid} was expected at {record.socket}, process {peer[0]} answers there")
        if process_start(record.pid) != record.started:
            raise BackendError(f"replica {record.pid} has ended")
        return await asyncio.open_connection(sock=connection)
    except BaseException:
        connection.close()
        raise


def end_process(record: ReplicaRecord) -> None:
    """Kills the process that a record names, and no other."""
    with contextlib.suppress(BackendError):
        handle = _handle_of(record)
        _send_signal(handle, record.pid, record.started, signal.SIGKILL)
        if handle is not None:
            os.close(handle)


def _handle_of(record: ReplicaRecord) -> int | None:
    """A handle of the process itself where the system has such, so that its number may be used again meanwhile."""
    handle = None
    if hasattr(os, "pidfd_open"):
        try:
            handle = os.pidfd_open(record.pid)
        except OSError as error:
            raise BackendError(f"replica {record.pid} has ended") from error
    if process_start(record.pid) != record.started:
        if handle is not None:
            os.close(handle)
        raise BackendError(f"replica {record.pid} has ended")
    return handle


def _send_signal(handle: int | None, pid: int, started: str, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, OSError):
        if handle is not None:
            signal.pidfd_send_signal(handle, number)
        elif process_start(pid) == started:
            os.kill(pid, number)
