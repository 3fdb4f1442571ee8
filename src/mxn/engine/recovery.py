"""What is done about a step that failed: only those that cause it are harmed.

it did not fit      the sequence that is last in line waits, until the others fit; alone and too large, it ends
anything else       each sequence is run alone, and those that fail again end
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from mxn.backends.base import Executor
from mxn.core.batch import StepBatch, StepResult
from mxn.engine.flight import Flight
from mxn.engine.scheduler import Scheduled, StepScheduler
from mxn.engine.sequence import SequenceStatus
from mxn.errors import ChipError, OutOfMemoryError

log = logging.getLogger(__name__)


def run_without_failure(
    flight: Flight,
    error: Exception,
    *,
    executor: Executor,
    scheduler: StepScheduler,
    describe: Callable[[list[Scheduled]], StepBatch],
) -> tuple[Flight, StepResult]:
    """Runs what can be run of a failed step. Nothing of it may be assumed, and no other step be under way.

    Args: describe: the batch of planned sequences as they stand now, since their tokens are known by now.
    Returns: what was run, and its result, which names those that fail. Raises: ChipError when the chip is lost.
    """

    def again(plan: list[Scheduled]) -> Flight:
        return Flight(plan=plan, batch=describe(plan), start_s=flight.start_s)

    while True:
        plan = [scheduled for scheduled, _ in flight.living()]
        if len(plan) == len(flight.plan):  # else those that have ended meanwhile may have been the cause
            if not isinstance(error, OutOfMemoryError):
                break
            if scheduler.preempt_last() is None:
                return flight, StepResult(tokens=(), failed=((plan[0].sequence.seq_id, str(error)),))
            plan = [p for p in plan if p.sequence.status is SequenceStatus.RUNNING]
            log.warning("a step did not fit (%s); %d of its sequences go on", error, len(plan))
        flight = again(plan)
        if not plan:
            return flight, StepResult(tokens=())
        try:
            return flight, executor.execute(flight.batch)
        except ChipError:
            raise
        except Exception as fault:
            error = fault
    log.error("a step failed; trying its %d sequences one by one", len(plan), exc_info=error)
    if len(plan) == 1:
        return flight, StepResult(tokens=(), failed=((plan[0].sequence.seq_id, describe_error(error)),))
    flight = again(plan)
    return flight, _execute_one_by_one(executor, flight.batch)


def describe_error(error: Exception) -> str:
    """What a client may know of a backend's failure."""
    return f"the backend failed on this sequence: {type(error).__name__}"


def _execute_one_by_one(executor: Executor, batch: StepBatch) -> StepResult:
    """Runs each sequence of a failed batch alone: KV writes repeat harmlessly, and only the guilty fail."""
    results = []
    for step in batch.sequences:
        try:
            results.append(executor.execute(StepBatch(step_id=batch.step_id, sequences=(step,))))
        except ChipError:
            raise
        except Exception as error:
            results.append(StepResult(tokens=(), failed=((step.seq_id, describe_error(error)),)))
    return StepResult(
        tokens=tuple(t for r in results for t in r.tokens),
        prompt_logprobs=tuple(p for r in results for p in r.prompt_logprobs),
        failed=tuple(f for r in results for f in r.failed),
    )
