"""The engine: schedule, execute, postprocess, once per step. Drives any executor; one thread calls it.

An executor that takes steps ahead (`Executor.submit`) is given the next step while it runs the current one (`flight`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from mxn.backends.base import Executor, PagedKV, SlotKV
from mxn.core.batch import SequenceStep, StepBatch, StepResult
from mxn.core.clock import Clock, SystemClock
from mxn.core.request import FinishReason, SequenceOutput, SequenceRequest, TokenLogprob
from mxn.energy.attribution import StepLedger
from mxn.engine.flight import Flight
from mxn.engine.paged import BlockPlacement
from mxn.engine.placement import Placement
from mxn.engine.recovery import describe_error, run_without_failure
from mxn.engine.results import faults_of
from mxn.engine.scheduler import Scheduled, SchedulerLimits, StepScheduler
from mxn.engine.sequence import Sequence
from mxn.engine.slots import SlotPlacement
from mxn.engine.stats import EngineStats
from mxn.errors import ChipError, RequestError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How an engine schedules.

    fingerprint: whatever makes KV differ for the same tokens; part of what reusable content is filed under.
    has_mixed_steps: as in the backend's `Capabilities`.
    looks_ahead: the next step is prepared while the current one runs, where the executor takes steps ahead.
    """

    max_num_seqs: int = 64
    max_step_tokens: int = 512
    prefix_cache: bool = True
    fingerprint: str = ""
    has_mixed_steps: bool = True
    looks_ahead: bool = True


class Engine:
    """Turns sequence requests into tokens with one executor.

    add, abort and step are called from one thread. Every sequence ends with exactly one output that carries a finish
    reason: tokens, an error or an abort; none vanishes.
    """

    def __init__(
        self,
        executor: Executor,
        settings: EngineSettings,
        clock: Clock | None = None,
        ledger: StepLedger | None = None,
    ) -> None:
        self.executor = executor
        self.placement = _make_placement(executor.kv, settings)
        self.stats = EngineStats(num_total_blocks=self.placement.num_rooms, num_free_blocks=self.placement.num_rooms)
        self.max_context = min(executor.info.max_context, self.placement.max_tokens)
        self._vocab_size = executor.info.vocab_size
        self._clock = clock or SystemClock()
        self._ledger = ledger
        limits = SchedulerLimits(
            max_num_seqs=settings.max_num_seqs,
            max_step_tokens=settings.max_step_tokens,
            has_mixed_steps=settings.has_mixed_steps,
        )
        self._scheduler = StepScheduler(self.placement, limits)
        self._sequences: dict[int, Sequence] = {}
        self._num_arrived = 0
        self._submits = type(executor).submit is not Executor.submit and isinstance(executor.kv, PagedKV)
        self._looks_ahead = self._submits and settings.looks_ahead
        self._ahead: Flight | None = None
        self._landed_s = 0.0

    @property
    def has_work(self) -> bool:
        """True while any sequence is not finished, or a step is under way."""
        return bool(self._sequences) or self._ahead is not None

    def add(self, request: SequenceRequest) -> None:
        """Puts a sequence in line.

        Raises: RequestError when the sequence could never run. The front door has checked already; this is the
        replica's own boundary, so that no message can end it.
        """
        self._check(request)
        seed = request.sampling.seed if request.sampling.seed is not None else request.fallback_seed
        seed = seed if seed is not None else secrets.randbits(63)
        root = self.placement.root(request.cache_salt)
        arrived_s = self._clock.now_s() - request.waited_s
        sequence = Sequence(request, arrival=self._num_arrived, seed=seed, root=root, arrived_s=arrived_s)
        self._num_arrived += 1
        self._sequences[request.seq_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, seq_ids: Iterable[int]) -> list[SequenceOutput]:
        """Ends sequences now and gives their room back; unknown or finished ids are ignored."""
        outputs = []
        for seq_id in seq_ids:
            sequence = self._sequences.get(seq_id)
            if sequence is not None:
                self.stats.num_aborted += 1
                energy_j = self._charge(seq_id)
                self._finish(sequence, FinishReason.ABORT)
                outputs.append(SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ABORT, energy_j=energy_j))
        self._refresh_gauges()
        return outputs

    def abort_all(self) -> None:
        """Ends every sequence; nobody is there to hear of it."""
        self.abort(list(self._sequences))

    def step(self) -> list[SequenceOutput]:
        """Runs one step and returns what it added to each sequence; the next one may be under way by then.

        Raises: ChipError when the chip is lost; every other failure ends at most the sequences that cause it.
        """
        flight, self._ahead = self._ahead or self._launch(), None
        if flight is None:
            self._refresh_gauges()
            return []
        if self._looks_ahead and flight.can_be_assumed:
            flight.assume(self.max_context)
            self._ahead = self._launch(may_preempt=False)
        return self._land(flight)

    def change_share(self, chip_share: float) -> None:
        """Answers for another share of the chip's energy from now on."""
        if self._ledger is not None:
            self._ledger.change_share(chip_share)

    def settle_energy(self) -> None:
        """Books the energy since the last reading; called now and then while nothing runs, so that idle counts too."""
        if self._ledger is not None:
            self._ledger.settle()
            self._refresh_gauges()

    def close(self) -> None:
        """Gives the executor's memory back, once no step uses it."""
        with suppress(ChipError):  # told already, or nobody's concern any more
            self._drop_ahead()
        self.executor.close()

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes that no running sequence holds."""
        self.placement.clear()

    def check_integrity(self) -> None:
        """Compares the placement's books with the living sequences. Raises: AssertionError at the first difference."""
        self.placement.check_integrity(self._sequences.values())

    # ------------------------------------------------------------------ before a step

    def _count_started(self, plan: list[Scheduled], now_s: float) -> None:
        """Books how long those stood in line that are in a step for the first time."""
        for scheduled in plan:
            sequence = scheduled.sequence
            if sequence.arrived_s is not None:
                self.stats.num_started += 1
                self.stats.queue_s += now_s - sequence.arrived_s
                sequence.arrived_s = None

    def _check(self, request: SequenceRequest) -> None:
        prompt, output, sampling = request.prompt_token_ids, request.output_token_ids, request.sampling
        if request.seq_id in self._sequences:
            raise RequestError(f"sequence {request.seq_id} exists already")
        if not prompt:
            raise RequestError("the prompt has no tokens; expected at least 1", param="prompt")
        if len(prompt) + len(output) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(prompt) + len(output)} tokens; with at least one token of output the limit is "
                f"{self.max_context - 1}",
                param="prompt",
                code="context_length_exceeded",
            )
        if min(min(prompt), 0, *output) < 0 or max(max(prompt), 0, *output) >= self._vocab_size:
            raise RequestError(f"prompt token ids must be in 0..{self._vocab_size - 1}", param="prompt")
        if sampling.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {sampling.max_tokens}", param="max_tokens")
        if len(output) >= sampling.max_tokens:
            raise RequestError(f"{len(output)} output tokens are there already, max_tokens is {sampling.max_tokens}")
        if any(not 0 <= token_id < self._vocab_size for token_id, _ in sampling.logit_bias):
            raise RequestError(f"logit_bias token ids must be in 0..{self._vocab_size - 1}", param="logit_bias")
        if any(not 0 <= token_id < self._vocab_size for token_id in sampling.stop_token_ids):
            raise RequestError(f"stop_token_ids must be in 0..{self._vocab_size - 1}", param="stop_token_ids")

    def _describe(self, scheduled: Scheduled) -> SequenceStep:
        sequence = scheduled.sequence
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + scheduled.num_tokens
        sampling = sequence.request.sampling
        return SequenceStep(
            seq_id=sequence.seq_id,
            token_ids=sequence.token_ids[start:end],
            start=start,
            block_ids=sequence.block_ids,
            slot=sequence.slot,
            is_sampled=end == len(sequence.token_ids),
            sampling=sampling,
            seed=sequence.seed,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_output_tokens=sequence.num_output_tokens,
            history=sequence.token_ids if sampling.needs_history else (),
        )

    # ------------------------------------------------------------------ the step itself

    def _launch(self, *, may_preempt: bool = True) -> Flight | None:
        """Plans a step and submits it, to an executor that takes steps ahead. None when there is nothing to run."""
        plan = self._scheduler.schedule(may_preempt=may_preempt)
        self._copy_prefixes()
        if not plan:
            return None
        self.stats.num_steps += 1
        start_s = self._clock.now_s()
        self._count_started(plan, start_s)
        flight = Flight(plan=plan, batch=self._batch_of(plan), start_s=start_s)
        if self._submits:
            try:
                flight.pending = self.executor.submit(flight.batch)
            except ChipError:
                raise
            except Exception as error:  # told when the step lands, as what fails later is
                flight.error = error
        return flight

    def _land(self, flight: Flight) -> list[SequenceOutput]:
        """Waits for a step and hands out its tokens."""
        try:
            result = self._result_of(flight)
            flight.settle()
        except ChipError:
            raise
        except Exception as error:
            self._drop_ahead()
            flight.take_back()
            flight, result = run_without_failure(
                flight, error, executor=self.executor, scheduler=self._scheduler, describe=self._batch_of
            )
        start_s, self._landed_s = max(flight.start_s, self._landed_s), self._clock.now_s()
        living = flight.living()
        if self._ledger is not None:
            steps = tuple(step for _, step in living)
            self._ledger.step(start_s, self._landed_s, StepBatch(step_id=flight.batch.step_id, sequences=steps))
        outputs = self._postprocess(flight, living, result)
        self.stats.step_s = self._clock.now_s() - start_s
        self.stats.busy_s += self.stats.step_s
        self._refresh_gauges()
        return outputs

    def _result_of(self, flight: Flight) -> StepResult:
        if flight.error is not None:
            raise flight.error
        return self.executor.execute(flight.batch) if flight.pending is None else flight.pending.result()

    def _drop_ahead(self) -> None:
        """Waits for the step under way and forgets it; what it wrote is written again or never read."""
        flight, self._ahead = self._ahead, None
        if flight is not None and flight.pending is not None:
            try:
                flight.pending.result()
            except ChipError:
                raise
            except Exception as error:
                log.info("step %d is dropped and failed: %s", flight.batch.step_id, error)

    def _batch_of(self, plan: list[Scheduled]) -> StepBatch:
        return StepBatch(step_id=self.stats.num_steps, sequences=tuple(map(self._describe, plan)))

    def _copy_prefixes(self) -> None:
        copies = self.placement.take_copies()
        if not copies:
            return
        try:
            self.executor.copy_kv(copies)
        except ChipError:
            raise
        except Exception as error:  # what the slots hold is unknown from here on
            raise ChipError(f"copying KV between slots failed: {describe_error(error)}") from error

    # ------------------------------------------------------------------ after a step

    def _postprocess(
        self, flight: Flight, living: list[tuple[Scheduled, SequenceStep]], result: StepResult
    ) -> list[SequenceOutput]:
        failed = faults_of(result, (p.sequence.seq_id for p in flight.plan), self._vocab_size)
        sampled = {token.seq_id: token for token in result.tokens}
        prompt_logprobs = dict(result.prompt_logprobs)
        outputs: list[SequenceOutput] = []
        for scheduled, step in living:
            sequence = scheduled.sequence
            seq_id = sequence.seq_id
            is_first = sequence.num_output_tokens == 0
            token = sampled.get(seq_id)
            if seq_id not in failed and step.is_sampled and token is None:
                failed[seq_id] = "the backend returned no token for this sequence"
            if seq_id in failed:
                self.stats.num_failed += 1
                self._finish(sequence, FinishReason.ERROR)
                outputs.append(SequenceOutput(seq_id=seq_id, finish_reason=FinishReason.ERROR, error=failed[seq_id]))
                continue
            if not flight.is_assumed:
                sequence.num_computed_tokens += scheduled.num_tokens
            self._scheduler.commit(sequence)
            self.stats.num_computed_tokens += scheduled.num_tokens
            self._collect_prompt_logprobs(sequence, prompt_logprobs.get(seq_id, ()))
            if token is None or not step.is_sampled:
                continue
            sequence.token_ids.append(token.token_id)
            self.stats.num_output_tokens += 1
            if is_first:
                self.stats.num_prompt_tokens += sequence.num_prompt_tokens
                self.stats.num_cached_tokens += sequence.num_cached_tokens
            reason = sequence.finish_after(token.token_id, self.max_context)
            wants_prompt = is_first and sequence.request.sampling.num_prompt_logprobs is not None
            outputs.append(
                SequenceOutput(
                    seq_id=seq_id,
                    token_ids=[token.token_id],
                    logprobs=[] if token.logprob is None else [token.logprob],
                    prompt_logprobs=sequence.prompt_logprobs if wants_prompt else None,
                    num_cached_tokens=sequence.num_cached_tokens,
                    finish_reason=reason,
                    energy_j=None if reason is None else self._charge(seq_id),
                )
            )
            if reason is not None:
                self.stats.num_finished += 1
                self._finish(sequence, reason)
        return outputs

    def _collect_prompt_logprobs(self, sequence: Sequence, entries: tuple[TokenLogprob, ...]) -> None:
        if len(sequence.prompt_logprobs) + len(entries) <= sequence.num_prompt_tokens:
            sequence.prompt_logprobs.extend(entries)

    def _charge(self, seq_id: int) -> float | None:
        """Closes a sequence's account. Returns its joules, None when they are not known."""
        return None if self._ledger is None else self._ledger.finish(seq_id)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._charge(sequence.seq_id)
        sequence.finish_reason = reason
        self._scheduler.remove(sequence)
        del self._sequences[sequence.seq_id]

    def _refresh_gauges(self) -> None:
        if self._ledger is not None:
            totals = self._ledger.totals
            self.stats.chip_energy_j, self.stats.idle_energy_j = totals.chip_j, totals.idle_j
            self.stats.request_energy_j = totals.requests_j
        self.stats.num_running = len(self._scheduler.running)
        self.stats.num_waiting = len(self._scheduler.waiting)
        self.stats.num_free_blocks = self.placement.num_free
        self.stats.num_preemptions = self._scheduler.num_preemptions


def _make_placement(kv: PagedKV | SlotKV, settings: EngineSettings) -> Placement:
    if isinstance(kv, PagedKV):
        return BlockPlacement(kv, settings.fingerprint, prefix_cache=settings.prefix_cache)
    return SlotPlacement(kv, settings.fingerprint, prefix_cache=settings.prefix_cache)
