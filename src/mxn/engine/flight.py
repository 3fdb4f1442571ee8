"""A step under way, and what the engine assumes of it to plan the next one before its tokens are known.

    host   plan 1 | plan 2 | wait 1, deliver 1 | plan 3 | wait 2, deliver 2 | ...
    chip            run 1 ..................... | run 2 ..................... | run 3

It is assumed that every sequence of the step gets its token and goes on, unless its length ends it for certain. Where
that was wrong (an end token, an abort, a failure), the sequence has one surplus token in the step that follows: it is
dropped when that step lands. Steps run in order, so rooms given back may be filled anew by a later step at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from mxn.backends.base import PendingStep
from mxn.core.batch import PENDING, SequenceStep, StepBatch
from mxn.engine.scheduler import Scheduled
from mxn.engine.sequence import SequenceStatus


@dataclass(kw_only=True, slots=True)
class Flight:
    """A step that was planned and, unless `pending` is None, submitted.

    error: what submitting it raised. is_assumed: whether its sequences stand as if it had been run.
    """

    plan: list[Scheduled]
    batch: StepBatch
    start_s: float
    pending: PendingStep | None = None
    error: Exception | None = None
    is_assumed: bool = False

    @property
    def can_be_assumed(self) -> bool:
        """True when the next step may be planned before it lands: the chip has it, the host no part in its draws."""
        return self.pending is not None and all(step.is_plain for step in self.batch.sequences)

    def living(self) -> list[tuple[Scheduled, SequenceStep]]:
        """Its sequences that have not ended since it was planned, with what was asked for each."""
        return [
            (scheduled, step)
            for scheduled, step in zip(self.plan, self.batch.sequences, strict=True)
            if scheduled.sequence.status is not SequenceStatus.FINISHED
        ]

    def assume(self, max_context: int) -> None:
        """Lets its sequences stand as if it had been run, `PENDING` in the place of each token to come."""
        self.is_assumed = True
        for scheduled, step in self.living():
            sequence = scheduled.sequence
            sequence.num_computed_tokens += scheduled.num_tokens
            if step.is_sampled and not sequence.ends_with_next(max_context):
                sequence.token_ids.append(PENDING)

    def settle(self) -> None:
        """Takes the placeholders out again; with the step's real result, sequences are then as if it had run alone."""
        if self.is_assumed:
            for scheduled, _ in self.living():
                if scheduled.sequence.token_ids[-1] == PENDING:
                    scheduled.sequence.token_ids.pop()

    def take_back(self) -> None:
        """Undoes `assume`, for a step that failed."""
        if self.is_assumed:
            self.settle()
            self.is_assumed = False
            for scheduled, _ in self.living():
                scheduled.sequence.num_computed_tokens -= scheduled.num_tokens
