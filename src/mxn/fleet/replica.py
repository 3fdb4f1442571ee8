"""The gateway's side of one replica: its life, and the streams of the sequences it runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from mxn.core.request import SequenceOutput, SequenceRequest
from mxn.engine.channel import ChannelError, pack, receive_from_replica
from mxn.engine.messages import (
    Abort,
    BlocksChanged,
    ChangeShare,
    ChipLost,
    Load,
    LoadFailed,
    LoadPhase,
    Ready,
    ReplicaInfo,
    ReportBlocks,
    ResetPrefixCache,
    Start,
    StepDone,
    Stop,
    ToReplica,
)
from mxn.engine.stats import EngineStats
from mxn.errors import BackendError, ReplicaDiedError
from mxn.fleet.stream import SequenceStream

log = logging.getLogger(__name__)

_LAST_WORDS = 20
"""Lines of the child's stderr that are kept to explain its end."""


class RunningReplica(Protocol):
    """A replica that has loaded its model, wherever it runs. Launchers make them; keepers hold them.

    info: what it runs and how; never None once a launcher has returned it.
    stats: the engine's gauges and counters after its newest step.
    last_message_s: when it last said anything, on this process's monotonic clock. One that lives and is ready says
      something every `ALIVE_S` seconds, however long a step takes; a keeper ends one that does not.
    last_step_s: when it last reported a step, or was given work while it had none.
    ended, end_reason: set once, when it can serve no more, whatever the cause; the reason is fit for a person.
    has_lost_chip: with `ended`: it said that its chip is gone.
    """

    info: ReplicaInfo | None
    stats: EngineStats
    last_message_s: float
    last_step_s: float
    ended: asyncio.Event
    end_reason: str
    has_lost_chip: bool

    @property
    def num_streams(self) -> int:
        """Sequences that were submitted and have not ended."""
        ...

    def submit(self, request: SequenceRequest) -> SequenceStream:
        """Begins a sequence. Never waits. Every stream ends: with a finish reason, or with ReplicaDiedError.

        Raises: ReplicaDiedError when the replica has ended.
        """
        ...

    def reset_prefix_cache(self) -> None:
        """Asks the engine to forget cached prefixes."""
        ...

    def watch_blocks(self, listener: Callable[[bytes, bytes], None]) -> None:
        """Has the listener told of prefix blocks: heads of the hashes of those it got and of those it lost, joined.

        It begins with those that are there. A replica whose `info.prefix_fingerprint` is empty tells nothing.
        """
        ...

    async def stop(self, timeout_s: float) -> None:
        """Lets running sequences finish, then ends the replica; kills it after `timeout_s`. May be called twice."""
        ...

    async def kill(self) -> None:
        """Ends the replica now and waits until it is gone. May be called twice."""
        ...


class ReplicaProcess(Protocol):
    """A replica's process as far as the gateway deals with it; `asyncio.subprocess.Process` is one.

    returncode: None while it runs; -N after signal N.
    stderr: its log, which must be read; None when the log goes elsewhere.
    """

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    @property
    def stderr(self) -> asyncio.StreamReader | None: ...

    def kill(self) -> None: ...

    async def wait(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class ReplicaLink:
    """A replica process and the gateway's end of its connection."""

    process: ReplicaProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Replica:
    """A `RunningReplica` that is a process at the other end of a link. Made by `start`."""

    def __init__(self, link: ReplicaLink) -> None:
        self.info: ReplicaInfo | None = None
        self.stats = EngineStats()
        self.last_message_s = self.last_step_s = time.monotonic()
        self.ended = asyncio.Event()
        self.end_reason = ""
        self.has_lost_chip = False
        self._on_blocks: Callable[[bytes, bytes], None] = lambda stored, evicted: None
        self._link = link
        self._streams: dict[int, SequenceStream] = {}
        self._unsent = bytearray()
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._tasks = [asyncio.create_task(self._read_stderr())]

    @classmethod
    async def start(cls, link: ReplicaLink, load: Load, on_phase: Callable[[str, float], None]) -> Self:
        """Lets a process that was just started load a model, and returns when it is ready.

        Raises: MxnError with the cause when loading fails; the process has ended then.
        """
        replica = cls(link)
        try:
            replica._send(load)
            replica.info = await replica._wait_until_ready(on_phase)
        except BaseException:
            await replica.kill()
            raise
        replica._tasks.append(asyncio.create_task(replica._receive()))
        return replica

    @property
    def num_streams(self) -> int:
        """Sequences that have not ended."""
        return len(self._streams)

    def submit(self, request: SequenceRequest) -> SequenceStream:
        """Begins a sequence. Raises: ReplicaDiedError when the process has ended."""
        if self.ended.is_set():
            raise ReplicaDiedError(self.end_reason)
        if not self._streams:
            self.last_step_s = time.monotonic()  # idle until now: progress is expected from here on
        stream = SequenceStream(request.seq_id, self._abort)
        self._streams[request.seq_id] = stream
        self._send(Start(request))
        return stream

    def reset_prefix_cache(self) -> None:
        """Asks the engine to forget cached prefixes."""
        self._send(ResetPrefixCache())

    def watch_blocks(self, listener: Callable[[bytes, bytes], None]) -> None:
        """Has the listener told of prefix blocks that are stored and evicted."""
        self._on_blocks = listener
        self._send(ReportBlocks())

    def change_share(self, chip_share: float) -> None:
        """Has it answer for another share of its chips' energy from now on."""
        self._send(ChangeShare(chip_share))

    async def stop(self, timeout_s: float) -> None:
        """Lets running sequences finish, then ends the process; kills it after `timeout_s`."""
        if not self.ended.is_set():
            self._send(Stop())
            try:
                await asyncio.wait_for(self.ended.wait(), timeout_s)
            except TimeoutError:
                log.warning("replica %d did not stop within %.0f s and is killed", self._link.process.pid, timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """Ends the process now."""
        if self._link.process.returncode is None:
            self._link.process.kill()
        await self._link.process.wait()
        self._link.writer.close()
        for task in self._tasks:
            await asyncio.wait([task], timeout=1.0)
            task.cancel()
        self._end("the replica was stopped")

    # ------------------------------------------------------------------ messages

    def _send(self, message: ToReplica) -> None:
        """Sends a message with all others of this turn of the loop: one system call for many."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += pack(message)

    def _flush(self) -> None:
        data, self._unsent = bytes(self._unsent), bytearray()
        if not self._link.writer.is_closing():
            self._link.writer.write(data)

    def _abort(self, seq_id: int) -> bool:
        """False when the sequence has ended already. An aborted one stays known until its last output."""
        if seq_id not in self._streams:
            return False
        self._send(Abort([seq_id]))
        return True

    async def _wait_until_ready(self, on_phase: Callable[[str, float], None]) -> ReplicaInfo:
        while True:
            message = await receive_from_replica(self._link.reader)
            if isinstance(message, LoadPhase):
                on_phase(message.phase, message.fraction)
            elif isinstance(message, Ready):
                self.stats = EngineStats(
                    num_free_blocks=message.info.num_blocks, num_total_blocks=message.info.num_blocks
                )
                return message.info
            elif isinstance(message, LoadFailed):
                raise BackendError(message.message)
            elif message is None:
                await self._link.process.wait()
                await asyncio.wait(self._tasks, timeout=1.0)
                raise BackendError(f"the replica process ended while loading ({self._epitaph()})")

    async def _receive(self) -> None:
        reason = ""
        try:
            while (message := await receive_from_replica(self._link.reader)) is not None:
                self.last_message_s = time.monotonic()
                if isinstance(message, StepDone):
                    self.last_step_s = self.last_message_s
                    self.stats = message.stats
                    for output in message.outputs:
                        self._deliver(output)
                elif isinstance(message, BlocksChanged):
                    self._on_blocks(message.stored, message.evicted)
                elif isinstance(message, ChipLost):
                    self.has_lost_chip = True
                    reason = message.message
        except ChannelError as error:
            reason = str(error)
            self._link.process.kill()
        await self._link.process.wait()
        await asyncio.wait(self._tasks[:1], timeout=1.0)
        self._end(reason or f"the replica process ended ({self._epitaph()})")

    def _deliver(self, output: SequenceOutput) -> None:
        is_last = output.finish_reason is not None
        stream = self._streams.pop(output.seq_id, None) if is_last else self._streams.get(output.seq_id)
        if stream is not None:
            stream.push(output)

    async def _read_stderr(self) -> None:
        stderr = self._link.process.stderr
        if stderr is None:
            return
        while line := await _read_line(stderr):
            text = line.decode(errors="replace").rstrip()
            self._last_words.append(text)
            log.info("replica %d: %s", self._link.process.pid, text)

    def _end(self, reason: str) -> None:
        if self.ended.is_set():
            return
        self.end_reason = reason
        self.ended.set()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(ReplicaDiedError(reason))

    def _epitaph(self) -> str:
        code = self._link.process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        words = self._last_words[-1] if self._last_words else "it said nothing"
        return f"{how}: {words}"


async def _read_line(stderr: asyncio.StreamReader) -> bytes:
    """A line, or as much of a very long one as the buffer holds."""
    try:
        return await stderr.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stderr.readexactly(error.consumed)
