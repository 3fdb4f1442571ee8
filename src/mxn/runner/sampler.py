"""Draws the next token of each sequence from its logits, by that sequence's own rules and generator.

Order of rules: repetition penalty, frequency and presence penalties, logit bias, ban of end tokens before `min_tokens`,
temperature, top-k, top-p over what top-k left, min-p. Log probabilities are those of the model itself: log-softmax of
the raw logits, before any of these (vLLM's default).

A draw uses one number from a generator keyed by (seed, number of output tokens), so it depends on the sequence alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mxn.core.batch import SampledToken, SequenceStep
from mxn.core.request import SamplingParams, TokenLogprob
from mxn.core.uniform import uniform

_MIN_TEMPERATURE = 1e-6  # below, (logit - max) / temperature leaves float32's range
_CANDIDATES = (64, 1024)  # how many of the likeliest tokens top-k and top-p look at before they look at all
_DRAW_BLOCK = 256
NOT_FINITE = "the model's logits hold NaN or infinity, so no token can be drawn"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """Tokens in the order of the rows, and (seq_id, reason) of rows that no token can be drawn from."""

    tokens: tuple[SampledToken, ...]
    failed: tuple[tuple[int, str], ...] = ()


def sample(logits: torch.Tensor, steps: Sequence[SequenceStep]) -> Sampled:
    """Draws one token per row.

    Args: logits (rows, vocabulary), any float dtype; not changed. steps: the sequence of each row.
    """
    if all(step.sampling.is_plain_greedy for step in steps):
        return take(*argmax(logits), steps)
    token_ids, best = _draw_all(logits, steps)
    return take(token_ids, best, steps, _logprobs(logits, steps, token_ids))


def take(
    token_ids: Sequence[int],
    best: np.ndarray,
    steps: Sequence[SequenceStep],
    logprobs: Sequence[TokenLogprob | None] | None = None,
) -> Sampled:
    """The drawn token of each row, or its failure where `best`, the row's largest logit, is not finite."""
    rows = [
        SampledToken(seq_id=step.seq_id, token_id=token_id, logprob=logprob)
        for step, token_id, logprob in zip(steps, token_ids, logprobs or [None] * len(steps), strict=True)
    ]
    is_finite = np.isfinite(best)
    if is_finite.all():
        return Sampled(tokens=tuple(rows))
    return Sampled(
        tokens=tuple(row for row, good in zip(rows, is_finite, strict=True) if good),
        failed=tuple((step.seq_id, NOT_FINITE) for step, good in zip(steps, is_finite, strict=True) if not good),
    )


def prompt_logprobs(logits: torch.Tensor, step: SequenceStep) -> tuple[TokenLogprob, ...]:
    """Log probabilities of the prompt tokens that follow each of the step's tokens, as far as the prompt goes.

    Args: logits (tokens of the step, vocabulary): row i predicts position start + i + 1.
    """
    targets = list(step.history[step.start + 1 : min(step.start + 1 + len(step.token_ids), step.num_prompt_tokens)])
    if not targets:
        return ()
    return _token_logprobs(logits[: len(targets)].float(), targets, [step.sampling.num_prompt_logprobs] * len(targets))


def argmax(logits: torch.Tensor) -> tuple[list[int], np.ndarray]:
    """Index and value of each row's largest logit; NaN counts as largest. numpy is ten times faster here than torch."""
    if logits.device.type == "cpu":
        rows = logits.float().numpy()
        token_ids = rows.argmax(-1)
        return token_ids.tolist(), np.take_along_axis(rows, token_ids[:, None], -1)[:, 0]
    best, indices = logits.float().max(-1)
    return indices.tolist(), best.cpu().numpy()


def _draw_all(logits: torch.Tensor, steps: Sequence[SequenceStep]) -> tuple[list[int], np.ndarray]:
    """Tokens of rows of all kinds, and each row's largest logit before any rule."""
    token_ids, best = argmax(logits)
    ruled = [i for i, step in enumerate(steps) if not step.sampling.is_greedy or _changes_logits(step)]
    ruled = [i for i in ruled if np.isfinite(best[i])]
    if not ruled:
        return token_ids, best
    work = logits[ruled].float() if len(ruled) < len(steps) else logits.to(torch.float32, copy=True)
    for row, i in enumerate(ruled):
        _apply_rules(work[row], steps[i])
    largest_ids, largest = argmax(work)
    random_rows = []
    for row, i in enumerate(ruled):
        if steps[i].sampling.is_greedy:
            token_ids[i] = largest_ids[row]
        else:
            random_rows.append(row)
    if random_rows:
        chosen = [steps[ruled[row]] for row in random_rows]
        drawn = _draw(work[random_rows] if len(random_rows) < len(ruled) else work, largest[random_rows], chosen)
        for row, token_id in zip(random_rows, drawn, strict=True):
            token_ids[ruled[row]] = token_id
    return token_ids, best


def _changes_logits(step: SequenceStep) -> bool:
    sampling = step.sampling
    return (
        bool(sampling.logit_bias)
        or step.num_output_tokens < sampling.min_tokens
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _apply_rules(row: torch.Tensor, step: SequenceStep) -> None:
    """Penalties, bias and bans of one sequence, in place."""
    sampling, vocab_size = step.sampling, row.shape[0]
    if sampling.repetition_penalty != 1.0 and step.history:
        seen = _indices(np.unique(np.asarray(step.history, np.int64)), vocab_size, row.device)
        values = row[seen]
        row[seen] = torch.where(values < 0, values * sampling.repetition_penalty, values / sampling.repetition_penalty)
    output = step.history[step.num_prompt_tokens :]
    if len(output) and (sampling.presence_penalty or sampling.frequency_penalty):
        written, counts = np.unique(np.asarray(output, np.int64), return_counts=True)
        indices = _indices(written, vocab_size, row.device)
        penalty = sampling.frequency_penalty * counts[: len(indices)] + sampling.presence_penalty
        row[indices] -= torch.from_numpy(penalty.astype(np.float32)).to(row.device)
    for token_id, bias in sampling.logit_bias:
        if 0 <= token_id < vocab_size:
            row[token_id] += bias
    if step.num_output_tokens < sampling.min_tokens:
        banned = np.unique(np.asarray(sampling.stop_token_ids, np.int64))
        row[_indices(banned, vocab_size, row.device)] = float("-inf")


def _indices(sorted_ids: np.ndarray, vocab_size: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(sorted_ids[sorted_ids < vocab_size]).to(device)


def _draw(logits: torch.Tensor, largest: np.ndarray, steps: Sequence[SequenceStep]) -> list[int]:
    """One token per row by inverse CDF. `logits` may be overwritten; `largest` is each row's maximum."""
    device = logits.device
    temperatures = torch.tensor([max(s.sampling.temperature, _MIN_TEMPERATURE) for s in steps], device=device)
    weights = logits.sub_(torch.from_numpy(largest).to(device)[:, None]).div_(temperatures[:, None]).exp_()
    uniforms = np.array([uniform(step.seed, step.num_output_tokens) for step in steps])
    vocab_size = weights.shape[1]

    token_ids = [-1] * len(steps)
    pending = [i for i, step in enumerate(steps) if _is_truncated(step.sampling, vocab_size)]
    for num_candidates in _CANDIDATES:
        if not pending or num_candidates >= vocab_size:
            break
        chosen = weights if len(pending) == len(steps) else weights[pending]
        drawn = _draw_truncated(chosen, uniforms[pending], [steps[i].sampling for i in pending], num_candidates)
        for i, token_id in zip(pending, drawn, strict=True):
            token_ids[i] = token_id
        pending = [i for i in pending if token_ids[i] < 0]
    rest = [i for i, token_id in enumerate(token_ids) if token_id < 0]
    if rest:
        chosen = weights if len(rest) == len(steps) else weights[rest]
        limits = [_limit(chosen[row], steps[i].sampling) for row, i in enumerate(rest)]
        for i, token_id in zip(rest, _draw_above(chosen, uniforms[rest], limits), strict=True):
            token_ids[i] = token_id
    return token_ids


def _is_truncated(sampling: SamplingParams, vocab_size: int) -> bool:
    return 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


def _limit(row: torch.Tensor, sampling: SamplingParams) -> float:
    """The smallest weight that the rules let stay; tokens of equal weight stay or go together."""
    vocab_size = row.shape[0]
    if not _is_truncated(sampling, vocab_size):
        return sampling.min_p
    kept, limit = row.cpu().numpy(), sampling.min_p
    if 0 < sampling.top_k < vocab_size:
        smallest = np.partition(kept, vocab_size - sampling.top_k)[vocab_size - sampling.top_k]
        kept, limit = kept[kept >= smallest], max(limit, float(smallest))
    return max(limit, _smallest_of_top_p(kept, sampling.top_p)) if sampling.top_p < 1.0 else limit


def _smallest_of_top_p(weights: np.ndarray, top_p: float) -> float:
    """The weight at which the largest ones together reach `top_p` of all: a selection, 15 times faster than a sort."""
    missing = top_p * weights.sum(dtype=np.float64)
    while len(weights) > _CANDIDATES[0]:
        pivot = weights[len(weights) // 2]
        above = weights[weights > pivot]
        mass = above.sum(dtype=np.float64)
        if mass >= missing:
            weights = above
            continue
        missing -= mass
        below = weights[weights <= pivot]
        if len(below) == len(weights):  # the pivot is the largest: its equals come next
            missing -= float(pivot) * (weights == pivot).sum()
            below = weights[weights < pivot]
            if missing <= 0 or not len(below):
                return float(pivot)
        weights = below
    descending = np.sort(weights)[::-1]
    ends = descending.cumsum(dtype=np.float64)
    return float(descending[min(int((ends < missing).sum()), len(descending) - 1)])


def _draw_above(weights: torch.Tensor, uniforms: np.ndarray, limits: Sequence[float]) -> list[int]:
    """Draws from what reaches each row's limit, in order of token id: first a block of 256 tokens, then one inside."""
    if any(limit > 0 for limit in limits):
        limit_column = torch.tensor(limits, dtype=weights.dtype, device=weights.device)[:, None]
        weights = torch.where(weights < limit_column, 0.0, weights)
    padding = -weights.shape[1] % _DRAW_BLOCK
    blocks = torch.nn.functional.pad(weights, (0, padding)).unflatten(1, (-1, _DRAW_BLOCK))
    block_ends = blocks.sum(-1).double().cpu().numpy().cumsum(-1)
    targets = uniforms * block_ends[:, -1]
    chosen = _first_above(block_ends, targets)
    rows = np.arange(len(chosen))
    inside = blocks[torch.from_numpy(rows), torch.from_numpy(chosen)].double().cpu().numpy().cumsum(-1)
    # Rescaled, because the float32 sum of a block and the float64 sum of its members differ in the last digits.
    before = np.where(chosen > 0, block_ends[rows, chosen - 1], 0.0)
    share = (targets - before) / (block_ends[rows, chosen] - before)
    return (chosen * _DRAW_BLOCK + _first_above(inside, share * inside[:, -1])).tolist()


def _draw_truncated(
    weights: torch.Tensor, uniforms: np.ndarray, params: Sequence[SamplingParams], num_candidates: int
) -> list[int]:
    """Draws among the likeliest tokens; -1 where `num_candidates` of them do not settle what top-k or top-p keep."""
    vocab_size = weights.shape[1]
    top, ids = weights.topk(num_candidates, -1)
    values, token_ids = top.double().cpu().numpy(), ids.cpu().numpy()
    top_k = np.array([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params])
    top_p = np.array([p.top_p for p in params])
    min_p = np.array([p.min_p for p in params])

    values = np.where(np.arange(num_candidates) < top_k[:, None], values, 0.0)
    ends = values.cumsum(-1)
    totals = np.where(top_k < vocab_size, ends[:, -1], weights.sum(-1).double().cpu().numpy())
    is_settled = (top_k <= num_candidates) | ((top_k == vocab_size) & (ends[:, -1] >= top_p * totals))
    # A token stays while those before it hold less than top_p; the first always stays.
    kept = (ends - values < (top_p * totals)[:, None]) & (values >= min_p[:, None])
    kept[:, 0] = True
    ends = np.where(kept, values, 0.0).cumsum(-1)
    picks = _first_above(ends, uniforms * ends[:, -1])
    drawn = token_ids[np.arange(len(picks)), picks]
    return np.where(is_settled, drawn, -1).tolist()


def _first_above(ends: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Per row, first index whose running sum exceeds the target; never one of weight zero."""
    last = (ends < ends[:, -1:]).sum(-1)
    return np.minimum((ends <= targets[:, None]).sum(-1), last)


def _logprobs(
    logits: torch.Tensor, steps: Sequence[SequenceStep], token_ids: Sequence[int]
) -> list[TokenLogprob | None]:
    asked = [i for i, step in enumerate(steps) if step.sampling.num_logprobs is not None]
    result: list[TokenLogprob | None] = [None] * len(steps)
    if asked:
        counts = [steps[i].sampling.num_logprobs for i in asked]
        found = _token_logprobs(logits[asked].float(), [token_ids[i] for i in asked], counts)
        for i, logprob in zip(asked, found, strict=True):
            result[i] = logprob
    return result


def _token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int | None]
) -> tuple[TokenLogprob, ...]:
    norms = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]) - norms
    width = min(max(count or 0 for count in counts), logits.shape[1])
    top, ids = logits.topk(width, -1) if width else (logits[:, :0], logits[:, :0].long())
    columns = (token_ids, chosen[:, 0].tolist(), ids.tolist(), (top - norms).tolist(), [count or 0 for count in counts])
    return tuple(
        TokenLogprob(token_id=token_id, logprob=logprob, top=tuple(zip(row_ids[:count], row[:count], strict=True)))
        for token_id, logprob, row_ids, row, count in zip(*columns, strict=True)
    )
