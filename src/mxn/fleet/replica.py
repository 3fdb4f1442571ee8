"""The gateway's side of one replica process: its life, and the streams of the sequences it runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Self

from mxn.core.request import SequenceOutput, SequenceRequest
from mxn.engine.channel import ChannelError, pack, receive_from_replica
from mxn.engine.messages import (
    Abort,
    Load,
    LoadFailed,
    LoadPhase,
    Ready,
    ReplicaInfo,
    ResetPrefixCache,
    Start,
    StepDone,
    Stop,
)
from mxn.engine.stats import EngineStats
from mxn.errors import BackendError, MxnError, ReplicaDiedError
from mxn.fleet.launchers.local import LocalProcess, launch

log = logging.getLogger(__name__)

_LAST_WORDS = 20
"""Lines of the child's stderr that are kept to explain its end."""


class SequenceStream:
    """The outputs of one sequence, to be iterated once.

    Outputs that arrive faster than they are taken are merged into one, so a slow reader holds at most its own tokens.
    """

    def __init__(self, seq_id: int, abort: Callable[[int], bool]) -> None:
        self.seq_id = seq_id
        self.num_cached_tokens = 0
        self._abort = abort
        self._pending: SequenceOutput | None = None
        self._error: MxnError | None = None
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._joules: asyncio.Future[float | None] | None = None

    def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        return self

    async def __anext__(self) -> SequenceOutput:
        """The outputs since the last call, as one.

        Raises: ReplicaDiedError when the replica process ended first.
        """
        while self._pending is None:
            if self._error is not None:
                raise self._error
            if self._is_closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        output, self._pending = self._pending, None
        if output.finish_reason is not None:
            self._is_closed = True
        return output

    def abort(self) -> None:
        """Ends the sequence if it has not ended; iteration stops, blocks are given back. Safe to call at any time."""
        if not self._is_closed:
            pending, self._pending = self._pending, None
            self._is_closed = True
            self._joules = asyncio.get_running_loop().create_future()
            if not self._abort(self.seq_id):
                self._joules.set_result(pending.energy_j if pending is not None else None)
            self._wake()

    async def aborted_joules(self) -> float | None:
        """Joules of a sequence that was aborted, once the engine has ended it; None when they are not known."""
        return None if self._joules is None else await asyncio.shield(self._joules)

    def push(self, output: SequenceOutput) -> None:
        """Adds an output (called by the replica's receiver)."""
        if self._joules is not None:
            if output.finish_reason is not None and not self._joules.done():
                self._joules.set_result(output.energy_j)
        elif not self._is_closed:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
            self._pending = output if self._pending is None else _merge(self._pending, output)
            self._wake()

    def fail(self, error: MxnError) -> None:
        """Ends iteration with an error after what is pending (called by the replica's receiver)."""
        self._error = error
        if self._joules is not None and not self._joules.done():
            self._joules.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Replica:
    """One replica process. Created by `start`; ends by `stop`, by itself, or with this process."""

    def __init__(self, child: LocalProcess) -> None:
        self.info: ReplicaInfo | None = None
        self.stats = EngineStats()
        self.last_message_s = time.monotonic()
        self.ended = asyncio.Event()
        self.end_reason = ""
        self._child = child
        self._streams: dict[int, SequenceStream] = {}
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._tasks = [asyncio.create_task(self._read_stderr())]

    @classmethod
    async def start(
        cls, load: Load, on_phase: Callable[[str, float], None], environment: dict[str, str] | None = None
    ) -> Self:
        """Starts a process, lets it load, and returns when it is ready.

        Raises: MxnError with the cause when loading fails; the process has ended then.
        """
        replica = cls(await launch(environment))
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
            self.last_message_s = time.monotonic()  # idle until now: progress is expected from here on
        stream = SequenceStream(request.seq_id, self._abort)
        self._streams[request.seq_id] = stream
        self._send(Start(request))
        return stream

    def reset_prefix_cache(self) -> None:
        """Asks the engine to forget cached prefixes."""
        self._send(ResetPrefixCache())

    async def stop(self, timeout_s: float) -> None:
        """Lets running sequences finish, then ends the process; kills it after `timeout_s`."""
        if not self.ended.is_set():
            self._send(Stop())
            try:
                await asyncio.wait_for(self.ended.wait(), timeout_s)
            except TimeoutError:
                log.warning("replica %d did not stop within %.0f s and is killed", self._child.process.pid, timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """Ends the process now."""
        if self._child.process.returncode is None:
            self._child.process.kill()
        await self._child.process.wait()
        self._child.writer.close()
        for task in self._tasks:
            await asyncio.wait([task], timeout=1.0)
            task.cancel()
        self._end("the replica was stopped")

    # ------------------------------------------------------------------ messages

    def _send(self, message: Load | Start | Abort | ResetPrefixCache | Stop) -> None:
        if not self._child.writer.is_closing():
            self._child.writer.write(pack(message))

    def _abort(self, seq_id: int) -> bool:
        """False when the sequence has ended already. An aborted one stays known until its last output."""
        if seq_id not in self._streams:
            return False
        self._send(Abort([seq_id]))
        return True

    async def _wait_until_ready(self, on_phase: Callable[[str, float], None]) -> ReplicaInfo:
        while True:
            message = await receive_from_replica(self._child.reader)
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
                await self._child.process.wait()
                await asyncio.wait(self._tasks, timeout=1.0)
                raise BackendError(f"the replica process ended while loading ({self._epitaph()})")

    async def _receive(self) -> None:
        reason = ""
        try:
            while (message := await receive_from_replica(self._child.reader)) is not None:
                self.last_message_s = time.monotonic()
                if isinstance(message, StepDone):
                    self.stats = message.stats
                    for output in message.outputs:
                        self._deliver(output)
        except ChannelError as error:
            reason = str(error)
            self._child.process.kill()
        await self._child.process.wait()
        await asyncio.wait(self._tasks[:1], timeout=1.0)
        self._end(reason or f"the replica process ended ({self._epitaph()})")

    def _deliver(self, output: SequenceOutput) -> None:
        is_last = output.finish_reason is not None
        stream = self._streams.pop(output.seq_id, None) if is_last else self._streams.get(output.seq_id)
        if stream is not None:
            stream.push(output)

    async def _read_stderr(self) -> None:
        stderr = self._child.process.stderr
        if stderr is None:
            return
        while line := await _read_line(stderr):
            text = line.decode(errors="replace").rstrip()
            self._last_words.append(text)
            log.info("replica %d: %s", self._child.process.pid, text)

    def _end(self, reason: str) -> None:
        if self.ended.is_set():
            return
        self.end_reason = reason
        self.ended.set()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(ReplicaDiedError(reason))

    def _epitaph(self) -> str:
        code = self._child.process.returncode
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


def _merge(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    return SequenceOutput(
        seq_id=first.seq_id,
        token_ids=first.token_ids + second.token_ids,
        text=None if first.text is None and second.text is None else (first.text or "") + (second.text or ""),
        num_counted_tokens=(
            None
            if first.num_counted_tokens is None and second.num_counted_tokens is None
            else first.num_tokens + second.num_tokens
        ),
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
        finish_reason=second.finish_reason,
        error=second.error,
        energy_j=second.energy_j,
        vector=second.vector,
    )
