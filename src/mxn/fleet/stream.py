"""The outputs of one sequence on their way from a replica to whoever asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from mxn.core.request import SequenceOutput
from mxn.errors import MxnError


class SequenceStream:
    """The outputs of one sequence, to be iterated once.

    Outputs that arrive faster than they are taken are merged into one, so a slow reader holds at most its own tokens.
    on_end: called once when the replica is done with the sequence: its last output came, or the replica ended.
    """

    __slots__ = (
        "_abort",
        "_error",
        "_is_closed",
        "_joules",
        "_pending",
        "_waiter",
        "num_cached_tokens",
        "on_end",
        "seq_id",
    )

    def __init__(self, seq_id: int, abort: Callable[[int], bool]) -> None:
        self.seq_id = seq_id
        self.num_cached_tokens = 0
        self.on_end: Callable[[], None] | None = None
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
        """Adds an output (called by the replica)."""
        if self._joules is not None:
            if output.finish_reason is not None and not self._joules.done():
                self._joules.set_result(output.energy_j)
        elif not self._is_closed:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
            self._pending = output if self._pending is None else merge(self._pending, output)
            self._wake()
        if output.finish_reason is not None and self.on_end is not None:
            self.on_end()

    def fail(self, error: MxnError) -> None:
        """Ends iteration with an error after what is pending (called by the replica)."""
        self._error = error
        if self._joules is not None and not self._joules.done():
            self._joules.set_result(None)
        self._wake()
        if self.on_end is not None:
            self.on_end()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    """Two outputs of one sequence, in order, as one."""
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
