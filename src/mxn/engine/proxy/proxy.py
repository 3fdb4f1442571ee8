"""Stands in for the engine of a replica whose model runs in a server: the same messages in and out, HTTP behind."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import msgspec

from mxn.core.request import FinishReason, SequenceOutput, SequenceRequest
from mxn.energy.attribution import ChipMeter
from mxn.engine.channel import ChannelError, ReplicaChannel
from mxn.engine.http_stream import ConnectionPool, TransportError
from mxn.engine.messages import Abort, ChangeShare, ResetPrefixCache, Start, StepDone, Stop
from mxn.engine.proxy.dialects import Delta, Dialect, body_error
from mxn.engine.proxy.process import ServerProcess
from mxn.engine.stats import EngineStats
from mxn.errors import MxnError, RequestError, ServerDiedError

log = logging.getLogger("mxn.proxy")

ENERGY_PERIOD_S = 2.0
"""How often the joules of a server's chips are booked and reported."""

_CHECK_S = 5.0
_CHECKS_FAILED = 3
_DEATH_S = 1.0  # between a connection's end and the news that its server has died


@dataclass(slots=True)
class _Stream:
    """One sequence at the server.

    raw: what came and is no whole line yet. last: its last output, kept until the server has told its counts.
    uncounted: text whose tokens the server has not counted so far.
    """

    request: SequenceRequest
    raw: bytearray = field(default_factory=bytearray)
    last: SequenceOutput | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    uncounted: str = ""
    has_ended: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def has_only_prompt(self) -> bool:
        """True while nothing of its output has come."""
        return not (self.num_tokens or self.uncounted or self.has_ended)


class Proxy:
    """Passes sequences to a server and its outputs back, at most `max_num_seqs` at once, in order of priority.

    Every sequence ends with exactly one output that carries a finish reason.
    """

    def __init__(
        self,
        server: ServerProcess,
        dialect: Dialect,
        *,
        max_num_seqs: int,
        max_context: int,
        meter: ChipMeter | None = None,
    ) -> None:
        self.stats = EngineStats()
        self._server = server
        self._dialect = dialect
        self._meter = meter
        self._pool = ConnectionPool(server.url)
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **server.headers}
        self._max_num_seqs = max_num_seqs
        self._max_context = max_context
        self._waiting: list[tuple[int, int, SequenceRequest, float]] = []
        self._arrivals = itertools.count()
        self._streams: dict[int, _Stream] = {}
        self._outputs: list[SequenceOutput] = []
        self._has_flush = False
        self._has_warned = False
        self._busy_since_s = 0.0
        self._is_stopping = False
        self._send: Callable[[StepDone], None] = lambda message: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Future[None] | None = None

    async def serve(self, channel: ReplicaChannel) -> bool:
        """Handles the gateway's messages until told to stop, which is True, or until the gateway is gone.

        Raises: ServerDiedError; ChannelError and OSError when the gateway cannot be read from or written to.
        """
        self._loop = loop = asyncio.get_running_loop()
        self._end, self._send = loop.create_future(), channel.send

        def died() -> None:
            loop.call_soon_threadsafe(self._fail)

        self._server.on_exit = died
        loop.add_reader(channel.fileno(), self._receive, channel)
        if self._server.has_exited:
            self._fail()
        watch, energy = asyncio.create_task(self._watch()), asyncio.create_task(self._report_energy())
        try:
            await self._end
            return self._is_stopping
        finally:
            loop.remove_reader(channel.fileno())
            self._server.on_exit = None
            watch.cancel()
            energy.cancel()
            tasks = [stream.task for stream in self._streams.values() if stream.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(watch, energy, *tasks, return_exceptions=True)
            self._pool.close()

    # ------------------------------------------------------------------ messages

    def _receive(self, channel: ReplicaChannel) -> None:
        try:
            messages = channel.receive_ready()
        except (ChannelError, OSError) as error:
            self._finish(error)
            return
        for message in messages:
            if message is None:
                self._finish()
            elif isinstance(message, Start):
                self._add(message.request)
            elif isinstance(message, Abort):
                self._abort(message.seq_ids)
            elif isinstance(message, ChangeShare):
                self._change_share(message.chip_share)
            elif isinstance(message, Stop):
                self._is_stopping = True
            elif isinstance(message, ResetPrefixCache):
                log.info("%s has no way to forget its prefixes", self._server.name)
        self._advance()

    def _add(self, request: SequenceRequest) -> None:
        heapq.heappush(self._waiting, (request.priority, next(self._arrivals), request, time.monotonic()))

    def _abort(self, seq_ids: Iterable[int]) -> None:
        for seq_id in seq_ids:
            stream = self._streams.get(seq_id)
            at = next((i for i, entry in enumerate(self._waiting) if entry[2].seq_id == seq_id), None)
            if stream is not None and not stream.has_ended:
                self._cut(stream)
                self._emit(SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ABORT), stream)
            elif stream is None and at is not None:
                del self._waiting[at]
                heapq.heapify(self._waiting)
                self._emit(SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ABORT), None)

    def _advance(self) -> None:
        """Starts what may run, and ends the replica when it is told to and nothing is left."""
        if self._end is None or self._end.done():
            return
        while self._waiting and len(self._streams) < self._max_num_seqs:
            _, _, request, arrived_s = heapq.heappop(self._waiting)
            self.stats.num_started += 1
            self.stats.queue_s += time.monotonic() - arrived_s + request.waited_s
            self._start(request)
        self.stats.num_running, self.stats.num_waiting = len(self._streams), len(self._waiting)
        if self._outputs:
            self._flush_soon()
        elif self._is_stopping and not self._streams and not self._waiting:
            self._finish()

    def _start(self, request: SequenceRequest) -> None:
        try:
            body = self._dialect.body(self._checked(request))
        except RequestError as error:
            self._emit(SequenceOutput(seq_id=request.seq_id, finish_reason=FinishReason.ERROR, error=str(error)), None)
            return
        if not self._streams:
            self._busy_since_s = time.monotonic()
        stream = self._streams[request.seq_id] = _Stream(request)
        stream.task = asyncio.create_task(self._run(stream, body))

    def _checked(self, request: SequenceRequest) -> SequenceRequest:
        """The request with no more output than the context holds. The front door has checked already; this is the
        replica's own boundary. Raises: RequestError when the prompt could never run."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        vocab_size = self._dialect.tokenizer.vocab_size
        if request.output_token_ids:
            raise RequestError("a server cannot go on with what another replica began")
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise RequestError(f"the prompt must hold token ids in 0..{vocab_size - 1}, at least one", param="prompt")
        room = self._max_context - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with at least one token of output the limit is "
                f"{self._max_context - 1}",
                param="prompt",
                code="context_length_exceeded",
            )
        if sampling.max_tokens <= room:
            return request
        return replace(request, sampling=replace(sampling, max_tokens=room))

    # ------------------------------------------------------------------ one sequence

    async def _run(self, stream: _Stream, body: bytes) -> None:
        seq_id = stream.request.seq_id
        try:
            status = await self._pool.exchange(
                "POST",
                self._dialect.path,
                headers=self._headers,
                body=body,
                sink=lambda data, _: self._feed(stream, data),
                timeout_s=None,
            )
            if status != 200:
                self._fail_stream(
                    stream, f"{self._server.name} answered HTTP {status}: {body_error(bytes(stream.raw))}"
                )
            elif stream.last is None:
                self._fail_stream(stream, f"{self._server.name} ended its answer without a finish reason")
            else:
                self._end_stream(stream)
        except TransportError as error:
            loop = asyncio.get_running_loop()
            if not await loop.run_in_executor(None, self._server.wait_for_exit, _DEATH_S):
                self._fail_stream(stream, str(error))
        finally:
            if self._streams.get(seq_id) is stream:
                del self._streams[seq_id]
                if not self._streams:
                    self.stats.busy_s += time.monotonic() - self._busy_since_s
            self._advance()

    def _feed(self, stream: _Stream, data: bytes) -> None:
        """Takes a piece of an event stream, or of an answer that is none."""
        if stream.has_ended:
            return
        raw = stream.raw
        raw += data
        end = raw.rfind(b"\n")
        if end < 0:
            return
        lines = bytes(raw[: end + 1]).split(b"\n")
        if not any(line.startswith(b"data:") for line in lines):
            return  # an error's body, read when the answer is complete
        del raw[: end + 1]
        for line in lines:
            if line.startswith(b"data:") and not stream.has_ended:
                self._event(stream, line[5:].strip())
        if len(self._streams) == 1:
            self._flush()  # no other output can come in this turn
        else:
            self._flush_soon()

    def _event(self, stream: _Stream, event: bytes) -> None:
        if event == b"[DONE]":
            return
        try:
            delta = self._dialect.read(event)
        except msgspec.MsgspecError as error:
            self._cut(stream)
            self._fail_stream(stream, f"{self._server.name} sent an event that cannot be read: {error}")
            return
        if delta.error is not None:
            self._cut(stream)
            self._fail_stream(stream, f"{self._server.name} failed on this sequence: {delta.error}")
            return
        stream.num_cached_tokens = max(stream.num_cached_tokens, delta.num_cached_tokens)
        if delta.reason is FinishReason.ERROR:
            self._cut(stream)
            self._fail_stream(stream, f'{self._server.name} ended this sequence with "{delta.finish_reason}"')
            return
        self._check_prompt(stream, delta)
        if stream.last is not None and (delta.token_ids or delta.text):
            self._cut(stream)  # the server goes on after a token that ends the sequence
            self._end_stream(stream)
            return
        is_over = self._ends_at_token(stream, delta)
        count = self._count(stream, delta)
        stream.num_tokens += count
        output = SequenceOutput(
            seq_id=stream.request.seq_id,
            token_ids=delta.token_ids,
            text=delta.text,
            num_counted_tokens=None if delta.text is None else count,
            logprobs=delta.logprobs,
        )
        if stream.last is not None:  # only counts come after the last output
            if delta.text is not None:
                stream.last = replace(stream.last, num_counted_tokens=stream.last.num_tokens + count)
        elif is_over or delta.reason is not None:
            stream.last = replace(output, finish_reason=FinishReason.STOP if is_over else delta.reason)
        elif output.token_ids or output.text or count:
            self._emit(output, stream)

    def _ends_at_token(self, stream: _Stream, delta: Delta) -> bool:
        """True when the event holds a token that ends the sequence; what follows it is dropped."""
        stops = stream.request.sampling.stop_token_ids
        at = next((i for i, token_id in enumerate(delta.token_ids) if token_id in stops), None)
        if at is None:
            return False
        delta.token_ids = delta.token_ids[: at + 1]
        delta.logprobs = delta.logprobs[: at + 1]
        if delta.text is not None:
            delta.text = ""
        return True

    def _count(self, stream: _Stream, delta: Delta) -> int:
        """Output tokens that an event adds: those it names, or what the server's own count has grown by."""
        if delta.text is None:
            return len(delta.token_ids)
        if delta.num_output_tokens is None:
            stream.uncounted += delta.text
            return 0
        stream.uncounted = ""
        return max(0, delta.num_output_tokens - stream.num_tokens)

    def _check_prompt(self, stream: _Stream, delta: Delta) -> None:
        sent = len(stream.request.prompt_token_ids)
        if delta.num_prompt_tokens not in (None, sent) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s counts %d prompt tokens where mxn sent %d", self._server.name, delta.num_prompt_tokens, sent
            )

    # ------------------------------------------------------------------ ends

    def _cut(self, stream: _Stream) -> None:
        """Closes the connection, which tells the server to stop."""
        if stream.task is not None:
            stream.task.cancel()

    def _end_stream(self, stream: _Stream) -> None:
        if stream.last is None:
            return
        if stream.uncounted:  # the server never counts: its text is, with mxn's tokenizer
            count = self._dialect.count_tokens(stream.uncounted)
            stream.last = replace(stream.last, num_counted_tokens=stream.last.num_tokens + count)
        self._emit(replace(stream.last, num_cached_tokens=stream.num_cached_tokens), stream)

    def _fail_stream(self, stream: _Stream, error: str) -> None:
        self._emit(SequenceOutput(seq_id=stream.request.seq_id, finish_reason=FinishReason.ERROR, error=error), stream)

    def _emit(self, output: SequenceOutput, stream: _Stream | None) -> None:
        """Puts an output into the next message; nothing follows one with a finish reason."""
        if stream is not None and stream.has_ended:
            return
        stats = self.stats
        stats.num_output_tokens += output.num_tokens
        if output.finish_reason is not None:
            if stream is not None:
                stream.has_ended = True
                stats.num_prompt_tokens += len(stream.request.prompt_token_ids)
                stats.num_cached_tokens += stream.num_cached_tokens
            if output.finish_reason is FinishReason.ABORT:
                stats.num_aborted += 1
            elif output.finish_reason is FinishReason.ERROR:
                stats.num_failed += 1
            else:
                stats.num_finished += 1
        self._outputs.append(output)

    def _flush_soon(self) -> None:
        """Sends what comes in this turn of the loop as one message, once the turn is over."""
        if not self._has_flush and self._loop is not None:
            self._has_flush = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._has_flush = False
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._report(outputs)
            self._advance()

    def _report(self, outputs: list[SequenceOutput]) -> None:
        try:
            self._send(StepDone(outputs, self.stats))
        except OSError as error:
            self._finish(error)

    def _change_share(self, chip_share: float) -> None:
        if self._meter is not None:
            self._book()
            self._meter.share = chip_share

    def _book(self) -> bool:
        """Adds the joules since the last time to the counter, as far as they are known."""
        joules = self._meter.advance() if self._meter is not None else None
        if joules is not None:
            self.stats.chip_energy_j = (self.stats.chip_energy_j or 0.0) + joules
        return joules is not None

    async def _report_energy(self) -> None:
        """Books the joules of the server's chips. Which sequence they went to is not known: its steps are not seen."""
        if self._meter is None:
            return
        while True:
            await asyncio.sleep(ENERGY_PERIOD_S)
            if self._book():
                self._report([])

    async def _watch(self) -> None:
        """Asks a server now and then whether it answers: one that mxn did not start, since nobody reports its end, and
        any that works on a prompt: its steps are not seen, so an answer is what tells a long prompt from a hang."""
        num_failed = 0
        while num_failed < _CHECKS_FAILED:
            await asyncio.sleep(_CHECK_S)
            has_prompt = any(stream.has_only_prompt for stream in self._streams.values())
            if self._server.is_own and not has_prompt:
                continue
            answers = await asyncio.to_thread(self._server.is_answering)
            if answers and has_prompt:
                self._report([])
            num_failed = 0 if answers or self._server.is_own else num_failed + 1
        self._finish(ServerDiedError(f"{self._server.name} has not answered {_CHECKS_FAILED} checks in a row"))

    def _fail(self) -> None:
        self._finish(self._server.died())

    def _finish(self, error: MxnError | OSError | None = None) -> None:
        if self._end is not None and not self._end.done():
            if error is None:
                self._end.set_result(None)
            else:
                self._end.set_exception(error)
