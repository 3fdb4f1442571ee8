"""A gateway's side of replicas that Ray Serve keeps: it joins them one by one and speaks to each as to a process."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from ray import serve

from mxn.engine.messages import Load, Stop
from mxn.errors import ReplicaDiedError
from mxn.fleet.launchers.ray.group import APP, HOST, Welcome
from mxn.fleet.launchers.ray.routes import routable
from mxn.fleet.replica import Replica, ReplicaLink

_LOOK_S = 0.25
"""How often a gateway looks whether Serve still routes to a replica."""

_FORGET_S = 5.0
"""A replica that was left is not joined again for so long: Serve takes a moment to notice that one has died."""

_FINISH_S = 600.0
"""For the sequences of a replica that Serve stops, which sets the shorter limit itself."""


class RayLauncher:
    """A `Launcher` that joins a gateway to replicas. Serve starts them, restarts them and decides how many there are.

    `start` waits until there is a replica that this gateway is not joined to: one that Serve started in the place of
    another, or because there is more to do. It is no failure when none comes.
    """

    def __init__(self) -> None:
        self._joined: dict[str, set[str]] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    async def start(
        self, load: Load, on_phase: Callable[[str, float], None], environment: Mapping[str, str]
    ) -> Replica:
        app = load.chips[0].facts[APP]
        joined = self._joined.setdefault(app, set())
        on_phase("waiting for Ray Serve", 0.0)
        async with self._turns.setdefault(app, asyncio.Lock()):  # so that no two join the same one
            connection = await _Connection.open(app, joined)
            joined.add(connection.replica_id)
        loop = asyncio.get_running_loop()
        connection.ended.add_done_callback(lambda _: loop.call_later(_FORGET_S, joined.discard, connection.replica_id))
        on_phase("waiting for Ray Serve", 1.0)
        replica = await RayReplica.start(connection.link(), load, on_phase)
        connection.when_unrouted(replica.retire)
        return replica


class RayReplica(Replica):
    """A `RunningReplica` of Serve. One that Serve is about to stop counts as ended, and finishes what it has."""

    _finishing: asyncio.Task[None] | None = None

    def retire(self) -> None:
        """Takes no more sequences from now on."""
        if not self.ended.is_set():
            self._send(Stop())
            self._finishing = asyncio.create_task(self._finish())
            self.end_reason = "Ray Serve stops this replica"
            self.ended.set()

    async def kill(self) -> None:
        if self._finishing is None:
            await super().kill()

    async def _finish(self) -> None:
        """Lets its sequences end; the connection closes after the last one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._link.process.wait(), _FINISH_S)
        await super().kill()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(ReplicaDiedError(self.end_reason))


class _Connection(asyncio.Transport):
    """One gateway joined to one replica, as the process and the pipe that a `Replica` speaks to.

    Frames to the replica leave in order, those that wait for the call before them together; frames from it come in
    one stream. replica_id: as Serve names it. ended: done when the stream is.
    """

    def __init__(self, app: str, handle: Any, name: str, outputs: Any, welcome: Welcome) -> None:
        super().__init__()
        self.replica_id = welcome.replica_id
        self.pid = welcome.pid
        self.returncode: int | None = None
        self.stderr = asyncio.StreamReader()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._app, self._handle, self._name, self._outputs = app, handle, name, outputs
        self._where = f"on {welcome.node}"
        self._reader = asyncio.StreamReader()
        self._frames: list[bytes] = []
        self._written = asyncio.Event()
        self._tasks = {asyncio.create_task(self._receive()), asyncio.create_task(self._send())}

    @classmethod
    async def open(cls, app: str, joined: set[str]) -> _Connection:
        """Joins a replica that is not joined yet; waits until there is one."""
        name = secrets.token_hex(8)
        handle = serve.get_deployment_handle(HOST, app).options(
            # Straight from process to process; by way of Ray's object store a call takes three times as long.
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )
        outputs = handle.options(method_name="connect", stream=True).remote(sorted(joined), name)
        try:
            welcome = msgspec.msgpack.decode(await anext(outputs), type=Welcome)
        except BaseException:
            outputs.cancel()
            raise
        return cls(app, handle, name, outputs, welcome)

    def link(self) -> ReplicaLink:
        """What a `Replica` is made of."""
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self._reader, loop=loop)
        return ReplicaLink(self, self._reader, asyncio.StreamWriter(self, protocol, None, loop))

    def when_unrouted(self, action: Callable[[], None]) -> None:
        """Calls `action` once when Serve does not route to the replica any more, unless it ends first."""

        async def watch() -> None:
            while self.replica_id in routable(self._app):
                await asyncio.sleep(_LOOK_S)
            action()

        self._tasks.add(asyncio.create_task(watch()))

    # ------------------------------------------------------------------ the pipe

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._frames.append(bytes(data))
        self._written.set()

    def is_closing(self) -> bool:
        return self.returncode is not None

    def close(self) -> None:
        self._end(0)

    async def _send(self) -> None:
        send = self._handle.options(method_name="send")
        try:
            while True:
                await self._written.wait()
                self._written.clear()
                frames, self._frames = self._frames, []
                await send.remote(self.replica_id, self._name, b"".join(frames))
        except Exception as error:
            self._fail(error)

    async def _receive(self) -> None:
        try:
            async for frames in self._outputs:
                self._reader.feed_data(frames)
        except Exception as error:
            self._fail(error)
        self._end(0)

    # ------------------------------------------------------------------ the process

    def kill(self) -> None:
        """Leaves the replica, which ends what this gateway began there."""
        self._end(-9)

    async def wait(self) -> int | None:
        """Returns when the connection has ended."""
        await asyncio.shield(self.ended)
        return self.returncode

    def _fail(self, error: Exception) -> None:
        self.stderr.feed_data(f"{self._where}: {_cause(error)}\n".encode())
        self._end(1)

    def _end(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
            self._outputs.cancel()
            self._reader.feed_eof()
            self.stderr.feed_eof()
            self.ended.set_result(None)
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()


def _cause(error: Exception) -> str:
    """The last line of what went wrong, without Ray's stack traces."""
    lines = [line for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
