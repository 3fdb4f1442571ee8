"""What an executor returned, held against its contract before the engine believes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mxn.core.batch import StepResult


def faults_of(result: StepResult, seq_ids: Iterable[int], vocab_size: int) -> dict[int, str]:
    """Sequences that must end with an error, with the reason: those the executor named, and those it answered wrongly.

    seq_ids: the sequences of the step.
    """
    failed = dict(result.failed)
    answers = Counter(token.seq_id for token in result.tokens)
    answers.update(failed.keys())
    for seq_id in seq_ids:
        if answers[seq_id] > 1:
            failed[seq_id] = f"the backend returned {answers[seq_id]} results for this sequence in one step"
    for token in result.tokens:
        if not 0 <= token.token_id < vocab_size:
            failed[token.seq_id] = f"the backend drew token {token.token_id} of a vocabulary of {vocab_size}"
    return failed
