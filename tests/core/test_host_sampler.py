"""The numpy sampler against the torch one, rule by rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mxn.core.batch import SequenceStep
from mxn.core.host_sampler import prompt_logprobs, sample
from mxn.core.request import SamplingParams

HISTORY = [3, 7, 7, 1, 9, 9, 9]
LOGITS = np.random.default_rng(0).normal(0, 2, 200).astype(np.float32)
RULES = [
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 0.9, "presence_penalty": -0.4},
    {"logit_bias": ((5, 9.0), (6, -100.0))},
    {"min_tokens": 50, "stop_token_ids": (int(LOGITS.argmax()),)},
    {"num_logprobs": 4},
]
DRAWS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05},
]


def make_step(counter: int = 3, **params: Any) -> SequenceStep:
    return SequenceStep(
        seq_id=counter,
        token_ids=HISTORY[-1:],
        start=len(HISTORY) - 1,
        block_ids=(),
        is_sampled=True,
        sampling=SamplingParams(**params),
        seed=11,
        num_prompt_tokens=len(HISTORY) - 3,
        num_output_tokens=counter,
        history=HISTORY,
    )


@pytest.mark.torch
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
def test_greedy_tokens_and_logprobs_equal_the_torch_samplers(rule: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from mxn.runner import sampler

    step = make_step(temperature=0.0, **rule)
    (ours,) = sample(LOGITS[None], [step]).tokens
    (theirs,) = sampler.sample(torch.from_numpy(LOGITS[None]), [step]).tokens
    assert ours.token_id == theirs.token_id
    if step.sampling.num_logprobs is not None:
        assert [t for t, _ in ours.logprob.top] == [t for t, _ in theirs.logprob.top]
        assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("rule", DRAWS, ids=str)
def test_tokens_are_drawn_as_often_as_by_the_torch_sampler(rule: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from mxn.runner import sampler

    count = 4000
    steps = [make_step(counter, **rule) for counter in range(count)]
    rows = np.broadcast_to(LOGITS, (count, len(LOGITS)))
    ours = np.bincount([t.token_id for t in sample(rows, steps).tokens], minlength=len(LOGITS))
    drawn = sampler.sample(torch.from_numpy(rows.copy()), steps).tokens
    theirs = np.bincount([t.token_id for t in drawn], minlength=len(LOGITS))
    assert set(np.flatnonzero(ours > 20)) <= set(np.flatnonzero(theirs))
    assert np.all(np.abs(ours - theirs) <= 5 * np.sqrt(ours + theirs + 1)), "more than five standard deviations apart"


def test_a_draw_depends_on_nothing_but_its_sequence() -> None:
    alone = sample(LOGITS[None], [make_step(2)]).tokens[0].token_id
    crowd = [make_step(counter) for counter in range(5)]
    assert sample(np.stack([LOGITS] * 5), crowd).tokens[2].token_id == alone


def test_a_row_that_is_no_number_fails_alone() -> None:
    rows = np.stack([LOGITS, np.full_like(LOGITS, np.nan)])
    result = sample(rows, [make_step(0), make_step(1)])
    assert [t.seq_id for t in result.tokens] == [0]
    assert [seq_id for seq_id, _ in result.failed] == [1]


def test_prompt_logprobs_stop_at_the_end_of_the_prompt() -> None:
    step = SequenceStep(
        seq_id=0,
        token_ids=HISTORY[2:],
        start=2,
        block_ids=(),
        is_sampled=True,
        sampling=SamplingParams(num_prompt_logprobs=2),
        seed=0,
        num_prompt_tokens=5,
        num_output_tokens=2,
        history=HISTORY,
    )
    entries = prompt_logprobs(np.stack([LOGITS] * 5), step)
    assert [entry.token_id for entry in entries] == HISTORY[3:5]
    assert all(len(entry.top) == 2 for entry in entries)
