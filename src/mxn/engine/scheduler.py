"""The step scheduler: which tokens of which sequences the next step computes.

Sources: vLLM V1's single rule (computed tokens catch up with known tokens; running before waiting; preemption by
recompute). Ours: admission that reserves the whole prompt, a shared prefill budget that neither starves a long prompt
nor lets it hold up short ones, and waiting for a prefix that another sequence is computing. Where the KV goes is the
placement's affair: blocks (`paged`) or slots (`slots`).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from mxn.engine.placement import Placement, Start
from mxn.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """Bounds of one step. `max_step_tokens` is shared by decoding sequences and prompt chunks.

    has_mixed_steps: False keeps the two apart: when both are there, steps take turns.
    """

    max_num_seqs: int
    max_step_tokens: int
    has_mixed_steps: bool = True


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence and how many of its tokens the step computes."""

    sequence: Sequence
    num_tokens: int


class _RoomIsShort(Exception):
    """Planning on would take room from a running sequence."""


class StepScheduler:
    """Keeps the waiting and running sequences and plans one step at a time.

    Guarantees: a step never exceeds its limits; every sequence that runs has room for what is planned; the sequence
    that is first in line always gets tokens, so nothing starves within a priority.
    """

    PREFILL_SHARES = 4
    """A prompt may take at most 1/4 of the prefill budget while others want it too."""

    def __init__(self, placement: Placement, limits: SchedulerLimits) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._placement = placement
        self._limits = limits
        self._was_prefill = False
        self._may_preempt = True

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in line."""
        self._placement.queue(sequence)
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, finished or not, and gives its room back."""
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._placement.release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self, *, may_preempt: bool = True) -> list[Scheduled]:
        """Plans the next step; empty when there is nothing to run, or when it takes preemption and that may not be."""
        self._may_preempt = may_preempt
        try:
            return self._plan()
        except _RoomIsShort:
            return []  # rooms that sequences got on the way are theirs already when they are planned again

    def _plan(self) -> list[Scheduled]:
        budget = self._limits.max_step_tokens
        if budget > sum(s.num_remaining_tokens == 1 for s in self.running):
            self._admit()
        if self._limits.has_mixed_steps:
            plan = self._plan_decodes(budget)
            plan += self._plan_prefills(budget - len(plan))
        else:
            plan = self._plan_one_kind(budget)
        # A prompt that is before others in line may have preempted one of them after it was planned.
        return [scheduled for scheduled in plan if scheduled.sequence.status is SequenceStatus.RUNNING]

    def commit(self, sequence: Sequence) -> None:
        """Records that its first `num_computed_tokens` tokens are computed."""
        self._placement.commit(sequence)

    def preempt_last(self) -> Sequence | None:
        """Sends the running sequence that is last in line back to wait, or returns None when fewer than two run."""
        if len(self.running) < 2:
            return None
        victim = max(self.running, key=_rank)
        self._preempt(victim)
        return victim

    # ------------------------------------------------------------------ parts of a plan

    def _plan_decodes(self, budget: int) -> list[Scheduled]:
        """One token for each sequence that has one left, first in line first; makes room by preempting the last."""
        plan: list[Scheduled] = []
        for sequence in sorted((s for s in self.running if s.num_remaining_tokens == 1), key=_rank)[:budget]:
            # It may have been preempted for a sequence before it.
            if sequence.status is SequenceStatus.RUNNING and self._grow(sequence, 1):
                plan.append(Scheduled(sequence, 1))
        return plan

    def _plan_one_kind(self, budget: int) -> list[Scheduled]:
        """Prompt chunks or decoding sequences, whichever was not served last; the other when there is none."""
        kinds = (
            (self._plan_decodes, self._plan_prefills)
            if self._was_prefill
            else (self._plan_prefills, self._plan_decodes)
        )
        for plan_kind in kinds:
            if plan := plan_kind(budget):
                self._was_prefill = plan_kind == self._plan_prefills
                return plan
        return []

    def _plan_prefills(self, budget: int) -> list[Scheduled]:
        """Shares the budget among prompts: the first in line, then those that got least so far, each at most its share;
        what is left over goes to them in the same order."""
        prompts = sorted((s for s in self.running if s.num_remaining_tokens > 1), key=_rank)
        if not prompts or budget < 1:
            return []
        order = prompts[:1] + sorted(prompts[1:], key=lambda s: (s.num_computed_tokens - s.num_cached_tokens, *s.rank))
        share = max(1, budget // min(len(order), self.PREFILL_SHARES))
        granted: dict[int, int] = {}
        for cap in (share, budget):
            for sequence in order:
                had = granted.get(sequence.seq_id, 0)
                more = min(cap, sequence.num_remaining_tokens - had, budget)
                if more > 0:
                    granted[sequence.seq_id] = had + more
                    budget -= more
        return [
            Scheduled(sequence, granted[sequence.seq_id])
            for sequence in order
            if sequence.seq_id in granted
            and sequence.status is SequenceStatus.RUNNING
            and self._grow(sequence, granted[sequence.seq_id])
        ]

    def _admit(self) -> None:
        """Starts waiting sequences while there is room for their whole known length beside all that was promised."""
        if not self.waiting:
            return
        promised = sum(self._placement.num_missing(s, s.num_remaining_tokens) for s in self.running)
        still_waiting: list[Sequence] = []
        for i, sequence in enumerate(self.waiting):
            outcome = Start.FULL
            if len(self.running) < self._limits.max_num_seqs:
                outcome = self._placement.start(sequence, promised)
            if outcome is Start.FULL:
                still_waiting += self.waiting[i:]
                break
            if outcome is Start.WAITS:
                still_waiting.append(sequence)
                continue
            if sequence.num_output_tokens == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            promised += self._placement.num_missing(sequence, sequence.num_remaining_tokens)
        self.waiting = still_waiting

    # ------------------------------------------------------------------ room

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gets room for the next tokens, preempting from the end of the line; False when it preempted itself."""
        while not self._placement.reserve(sequence, num_tokens):
            if not self._may_preempt:
                raise _RoomIsShort
            victim = max(self.running, key=_rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._placement.release(victim)
        victim.num_computed_tokens = 0
        victim.status = SequenceStatus.WAITING
        self.num_preemptions += 1
        insort(self.waiting, victim, key=_rank)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
