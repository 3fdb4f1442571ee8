"""Draws next tokens from logits in host memory, with numpy alone, by the same rules as the torch sampler.

Order of rules: repetition penalty, frequency and presence penalties, logit bias, ban of end tokens before `min_tokens`,
temperature, top-k, top-p over what top-k left, min-p. Log probabilities are those of the raw logits. A draw uses one
number that depends on the sequence's seed and its output tokens so far, so neighbours in the batch change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mxn.core.batch import SampledToken, SequenceStep, StepResult
from mxn.core.request import TokenLogprob
from mxn.core.uniform import uniform

Floats = npt.NDArray[np.floating]

_MIN_TEMPERATURE = 1e-6
NOT_FINITE = "the model's logits hold NaN or infinity, so no token can be drawn"


def sample(logits: Floats, steps: Sequence[SequenceStep]) -> StepResult:
    """Draws one token per row; rows without a finite maximum are in `failed`.

    Args: logits (rows, vocabulary), any float dtype; not changed. steps: the sequence of each row.
    """
    tokens, failed = [], []
    largest_ids = logits.argmax(-1)  # NaN counts as largest
    for row, largest_id, step in zip(logits, largest_ids.tolist(), steps, strict=True):
        if not np.isfinite(row[largest_id]):
            failed.append((step.seq_id, NOT_FINITE))
            continue
        token_id = largest_id if step.sampling.is_plain_greedy else _draw(row, step)
        count = step.sampling.num_logprobs
        logprob = None if count is None else _token_logprob(row, token_id, count)
        tokens.append(SampledToken(seq_id=step.seq_id, token_id=token_id, logprob=logprob))
    return StepResult(tokens=tuple(tokens), failed=tuple(failed))


def prompt_logprobs(logits: Floats, step: SequenceStep) -> tuple[TokenLogprob, ...]:
    """Log probabilities of the prompt tokens that follow each of the step's tokens, as far as the prompt goes.

    Args: logits (tokens of the step, vocabulary): row i predicts position start + i + 1.
    """
    targets = step.history[step.start + 1 : min(step.start + 1 + len(step.token_ids), step.num_prompt_tokens)]
    count = step.sampling.num_prompt_logprobs or 0
    return tuple(_token_logprob(row, target, count) for row, target in zip(logits, targets, strict=False))


def _draw(row: Floats, step: SequenceStep) -> int:
    sampling = step.sampling
    scores = row.astype(np.float64)
    _apply_rules(scores, step)
    if sampling.is_greedy:
        return int(scores.argmax())
    weights = np.exp((scores - scores.max()) / max(sampling.temperature, _MIN_TEMPERATURE))
    if 0 < sampling.top_k < len(weights):
        weights[weights < np.partition(weights, -sampling.top_k)[-sampling.top_k]] = 0.0
    if sampling.top_p < 1.0:
        descending = np.sort(weights)[::-1]
        num_kept = int((descending.cumsum() < sampling.top_p * descending.sum()).sum()) + 1
        weights[weights < descending[min(num_kept, len(descending)) - 1]] = 0.0
    weights[weights < sampling.min_p] = 0.0
    ends = weights.cumsum()
    target = uniform(step.seed, step.num_output_tokens) * ends[-1]
    return int(min(np.searchsorted(ends, target, side="right"), np.flatnonzero(weights)[-1]))


def _apply_rules(scores: npt.NDArray[np.float64], step: SequenceStep) -> None:
    """Penalties, bias and bans of one sequence, in place."""
    sampling = step.sampling
    if sampling.repetition_penalty != 1.0 and len(step.history):
        seen = np.unique(np.asarray(step.history))
        factor = sampling.repetition_penalty
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * factor, scores[seen] / factor)
    written, counts = np.unique(np.asarray(step.history[step.num_prompt_tokens :], np.int64), return_counts=True)
    scores[written] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    for token_id, bias in sampling.logit_bias:
        scores[token_id] += bias
    if step.num_output_tokens < sampling.min_tokens:
        scores[list(sampling.stop_token_ids)] = -np.inf


def _token_logprob(row: Floats, token_id: int, count: int) -> TokenLogprob:
    scores = row.astype(np.float64)
    largest = scores.max()
    logprobs = scores - largest - np.log(np.exp(scores - largest).sum())
    top = np.argsort(-logprobs, kind="stable")[:count]
    return TokenLogprob(
        token_id=token_id,
        logprob=float(logprobs[token_id]),
        top=tuple((int(i), float(logprobs[i])) for i in top),
    )
