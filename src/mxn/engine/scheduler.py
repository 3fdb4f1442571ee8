"""The step scheduler: which tokens of which sequences the next step computes.

Sources: vLLM V1's single rule (computed tokens catch up with known tokens; running before waiting; preemption by
recompute). Ours: admission that reserves the whole prompt, a shared prefill budget that neither starves a long prompt
nor lets it hold up short ones, and waiting for a prefix that another sequence is computing.
"""

from __future__ import annotations

from array import array
from bisect import insort
from dataclasses import dataclass

from mxn.engine.block_pool import BlockPool
from mxn.engine.prefix_cache import PrefixCache
from mxn.engine.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """Bounds of one step. `max_step_tokens` is shared by decoding sequences and prompt chunks."""

    max_num_seqs: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence and how many of its tokens the step computes."""

    sequence: Sequence
    num_tokens: int


class StepScheduler:
    """Keeps the waiting and running sequences and plans one step at a time.

    Guarantees: a step never exceeds its limits; every sequence that runs has blocks for what is planned; the sequence
    that is first in line always gets tokens, so nothing starves within a priority.
    """

    PREFILL_SHARES = 4
    """A prompt may take at most 1/4 of the prefill budget while others want it too."""

    def __init__(self, pool: BlockPool, cache: PrefixCache, block_size: int, limits: SchedulerLimits) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._pool = pool
        self._cache = cache
        self._block_size = block_size
        self._limits = limits

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in line."""
        self._cache.extend(sequence.block_chain, sequence.root, sequence.token_ids)
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, finished or not, and gives its blocks back."""
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> list[Scheduled]:
        """Plans the next step; empty only when there is nothing to run."""
        budget = self._limits.max_step_tokens
        if budget > sum(s.num_remaining_tokens == 1 for s in self.running):
            self._admit()
        plan = self._plan_decodes(budget)
        plan += self._plan_prefills(budget - len(plan))
        # A prompt that is before others in line may have preempted one of them after it was planned.
        return [scheduled for scheduled in plan if scheduled.sequence.status is SequenceStatus.RUNNING]

    def commit(self, scheduled: Scheduled) -> None:
        """Records that the planned tokens are computed and announces the blocks that became full."""
        sequence = scheduled.sequence
        sequence.num_computed_tokens += scheduled.num_tokens
        self._cache.extend(sequence.block_chain, sequence.root, sequence.token_ids)
        num_full = min(sequence.num_computed_tokens // self._block_size, len(sequence.block_chain))
        for i in range(sequence.num_published_blocks, num_full):
            self._cache.publish(sequence.seq_id, sequence.block_chain[i], sequence.block_ids[i])
        sequence.num_published_blocks = max(sequence.num_published_blocks, num_full)

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
        promised = sum(self._num_blocks_missing(s, s.num_remaining_tokens) for s in self.running)
        still_waiting: list[Sequence] = []
        for i, sequence in enumerate(self.waiting):
            if len(self.running) >= self._limits.max_num_seqs:
                still_waiting += self.waiting[i:]
                break
            # At least one token is computed anew: its logits are needed.
            reusable = (len(sequence.token_ids) - 1) // self._block_size if sequence.may_reuse_prefix else 0
            reusable = min(reusable, len(sequence.block_chain))
            hits = self._cache.match(sequence.block_chain, reusable)
            if len(hits) < reusable and self._cache.is_in_flight(sequence.block_chain[len(hits)]):
                still_waiting.append(sequence)
                continue
            needed = self._num_blocks(len(sequence.token_ids)) - len(hits)
            taken_from_free = sum(self._pool.is_free(b) for b in hits)
            if needed + taken_from_free + promised > self._pool.num_free:
                still_waiting += self.waiting[i:]
                break
            self._start(sequence, hits, reusable)
            promised += needed
        self.waiting = still_waiting

    def _start(self, sequence: Sequence, hits: list[int], reusable: int) -> None:
        for block_id in hits:
            self._pool.share(block_id)
        sequence.block_ids = array("i", hits)
        sequence.num_published_blocks = len(hits)
        sequence.num_computed_tokens = len(hits) * self._block_size
        if sequence.num_output_tokens == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        self._cache.announce(sequence.seq_id, sequence.block_chain[len(hits) : reusable])
        self.running.append(sequence)

    # ------------------------------------------------------------------ blocks

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _num_blocks_missing(self, sequence: Sequence, num_tokens: int) -> int:
        return self._num_blocks(sequence.num_computed_tokens + num_tokens) - len(sequence.block_ids)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gets the blocks for the next tokens, preempting from the end of the line; False when it preempted itself."""
        missing = self._num_blocks_missing(sequence, num_tokens)
        while missing > self._pool.num_free:
            victim = max(self.running, key=_rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_ids.extend(self._pool.allocate(missing))
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._give_back(victim)
        victim.status = SequenceStatus.WAITING
        self.num_preemptions += 1
        insort(self.waiting, victim, key=_rank)

    def _give_back(self, sequence: Sequence) -> None:
        self._cache.withdraw(sequence.seq_id, sequence.block_chain[sequence.num_published_blocks :])
        self._pool.release(sequence.block_ids)
        sequence.block_ids = array("i")
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
