"""The stream that a request sees: its sequence waits in line, runs on a replica, and survives that replica's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from mxn.core.request import SequenceOutput, SequenceRequest
from mxn.engine.messages import ReplicaInfo
from mxn.errors import MxnError, ReplicaDiedError
from mxn.fleet.stream import SequenceStream

_MAX_MOVES = 3
"""A sequence that has lost so many replicas is more likely their bane than their victim."""


class Home(Protocol):
    """Where a relayed stream turns to; see `mxn.fleet.dispatch.Dispatch`."""

    def new_seq_id(self) -> int:
        """An id that no sequence had."""
        ...

    def take_back(self, relay: RelayedStream) -> bool:
        """Finds the sequence another replica, at once or after a wait; False when none is to be expected."""
        ...

    def leave(self, relay: RelayedStream) -> None:
        """Takes the sequence out of the line, if it is there."""
        ...


class RelayedStream:
    """The outputs of one sequence, to be iterated once; as `SequenceStream`, whichever replicas they come from.

    When the replica ends, the sequence goes to another one. Without output so far it begins anew. With output it is
    continued: the other replica gets the tokens so far and draws on with the same seed and counter, so the text is the
    one that an unbroken run would have had, and no token comes twice. That takes an engine of mxn, and a replica of
    the same kind, since another number format may prefer another token.
    A sequence is moved at most `_MAX_MOVES` times, and not twice without a token in between.

    request: what is asked for, as the next replica is to be told.
    arrival: its place in line. like: the replica that began it, once it must be continued by one of the same kind.
    """

    __slots__ = (
        "_error",
        "_has_output",
        "_home",
        "_info",
        "_is_closed",
        "_loss",
        "_may_move",
        "_num_moves",
        "_stream",
        "_token_ids",
        "_waiter",
        "arrival",
        "deadline",
        "like",
        "request",
    )

    def __init__(self, request: SequenceRequest, home: Home, arrival: int = 0) -> None:
        self.request = request
        self.arrival = arrival
        self.like: ReplicaInfo | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self._home = home
        self._stream: SequenceStream | None = None
        self._info: ReplicaInfo | None = None
        self._token_ids: list[int] = []
        self._has_output = False
        self._num_moves = 0
        self._may_move = True
        self._loss: ReplicaDiedError | None = None
        self._error: MxnError | None = None
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def loss(self) -> ReplicaDiedError | None:
        """How its last replica ended, when it waits for another one."""
        return self._loss

    def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        return self

    async def __anext__(self) -> SequenceOutput:
        """The outputs since the last call, as one.

        Raises: ReplicaDiedError when its replica ended and no other can go on; OverloadedError or UnavailableError
        when it waited in vain.
        """
        while True:
            stream = self._stream
            if stream is None:
                await self._wait()
                continue
            try:
                output = await stream.__anext__()
            except ReplicaDiedError as error:
                self._move(error)
                continue
            if output.token_ids or output.text:
                self._has_output = self._may_move = True
                self._token_ids += output.token_ids
            if output.finish_reason is None:
                return output
            self._is_closed = True
            # What the replicas before spent on it is not known.
            return replace(output, energy_j=None) if self.request.output_token_ids else output

    def abort(self) -> None:
        """Ends the sequence if it has not ended; iteration stops. Safe to call at any time."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._stream is not None:
            self._stream.abort()
        else:
            self._home.leave(self)
            self._wake()

    async def aborted_joules(self) -> float | None:
        """Joules of a sequence that was aborted, once the engine has ended it; None when they are not known."""
        if self._stream is None or self.request.output_token_ids:
            return None
        return await self._stream.aborted_joules()

    # ------------------------------------------------------------------ for the dispatch

    def suits(self, info: ReplicaInfo) -> bool:
        """True when a replica that says this of itself may run the sequence."""
        like = self.like
        if like is None:
            return True
        return info.can_continue and _kind(info) == _kind(like)

    def begin(self, stream: SequenceStream, info: ReplicaInfo | None) -> None:
        """Its replica has taken it."""
        self._stream, self._info = stream, info
        self._end_wait()

    def refuse(self, error: MxnError) -> None:
        """It has waited in vain."""
        self._error = error
        self._end_wait()

    # ------------------------------------------------------------------ moves

    def _move(self, error: ReplicaDiedError) -> None:
        """Goes back into line after its replica's end. Raises: the error when that is no use."""
        info = self._info
        can_go_on = not self._has_output or (info is not None and info.can_continue)
        if self._is_closed or not self._may_move or not can_go_on or self._num_moves >= _MAX_MOVES:
            raise error
        self._stream, self._loss = None, error
        self._num_moves += 1
        self._may_move = False
        if self._has_output:
            sampling = replace(self.request.sampling, num_prompt_logprobs=None)  # the first output brought them
            self.request = replace(self.request, output_token_ids=list(self._token_ids), sampling=sampling)
            self.like = info
        self.request = replace(self.request, seq_id=self._home.new_seq_id(), waited_s=0.0)
        if not self._home.take_back(self):
            self._is_closed = True
            raise error

    async def _wait(self) -> None:
        """Returns when it has a replica. Raises: what it was refused with; StopAsyncIteration after an abort."""
        while self._stream is None:
            if self._is_closed:
                raise StopAsyncIteration
            if self._error is not None:
                self._is_closed = True
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _end_wait(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _kind(info: ReplicaInfo) -> tuple[str, ...]:
    """What replicas must have in common to compute the same numbers."""
    return info.backend, info.quantisation, info.attention, info.program
