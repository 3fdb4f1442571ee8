"""Sampling rules against transformers' processors and plain torch, and independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.core.batch import SequenceStep  # noqa: E402
from mxn.core.request import SamplingParams  # noqa: E402
from mxn.core.uniform import uniform  # noqa: E402
from mxn.runner.sampler import NOT_FINITE, prompt_logprobs, sample  # noqa: E402

pytestmark = pytest.mark.torch

VOCAB_SIZE = 300


def make_step(seq_id: int = 0, seed: int = 0, counter: int = 0, history: list[int] | None = None, **params: Any) -> Any:
    history = history or [1]
    return SequenceStep(
        seq_id=seq_id,
        token_ids=history[-1:],
        start=len(history) - 1,
        block_ids=(),
        is_sampled=True,
        sampling=SamplingParams(**params),
        seed=seed,
        num_prompt_tokens=max(1, len(history) - counter),
        num_output_tokens=counter,
        history=history,
    )


def make_logits(rows: int = 1, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Any:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def draw(logits: Any, count: int, **params: Any) -> Any:
    """Token ids of `count` draws from one row, each with its own counter."""
    steps = [make_step(i, seed=7, counter=i, **params) for i in range(count)]
    return torch.tensor([t.token_id for t in sample(logits.expand(count, -1), steps).tokens])


def chi_square_fits(found: Any, expected: Any, count: int) -> bool:
    """Whether draw counts fit probabilities, at five standard deviations of the chi-square statistic."""
    kept = expected * count >= 5
    observed = torch.bincount(found, minlength=len(expected)).double()
    cells = torch.cat([observed[kept], observed[~kept].sum()[None]])
    wanted = torch.cat([expected[kept] * count, (expected[~kept].sum() * count)[None]])
    cells, wanted = cells[wanted > 1e-9], wanted[wanted > 1e-9]
    statistic = float(((cells - wanted) ** 2 / wanted).sum())
    freedom = len(cells) - 1
    return statistic < freedom + 5 * math.sqrt(2 * max(freedom, 1))


def processed(logits: Any, *processors: Any) -> Any:
    """Probabilities after transformers' own processors."""
    scores = logits.clone()
    for processor in processors:
        scores = processor(None, scores)
    return scores.double().softmax(-1)[0]


def warpers(**params: Any) -> list[Any]:
    from transformers.generation import logits_process as hf

    made = []
    if "temperature" in params:
        made.append(hf.TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        made.append(hf.TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        made.append(hf.TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        made.append(hf.MinPLogitsWarper(params["min_p"]))
    return made


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"top_k": 5},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 0.99},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution_of_transformers_warpers(params: dict[str, Any]) -> None:
    logits = make_logits()
    expected = processed(logits, *warpers(**params))
    found = draw(logits, 4000, **params)
    assert set(found.tolist()) <= set(expected.nonzero().flatten().tolist())
    assert chi_square_fits(found, expected, 4000)
    reference = torch.multinomial(expected, 4000, replacement=True, generator=torch.Generator().manual_seed(3))
    assert chi_square_fits(reference, expected, 4000), "the test itself must accept torch's own draws"


def test_chi_square_rejects_a_wrong_distribution() -> None:
    logits = make_logits()
    assert not chi_square_fits(draw(logits, 4000, temperature=1.3), processed(logits), 4000)


@pytest.mark.parametrize(
    "params", [{"top_p": 0.9}, {"top_p": 0.9999999}, {"top_k": 2000}, {"top_k": 3000, "top_p": 0.8}]
)
def test_rules_that_leave_thousands_of_tokens_are_exact(params: dict[str, Any]) -> None:
    logits = torch.linspace(0, 1.5, 5000)[torch.randperm(5000, generator=torch.Generator().manual_seed(2))][None]
    expected = processed(logits, *warpers(**params))
    found = draw(logits, 3000, **params)
    assert int((expected > 0).sum()) > 1024
    # Sums of thousands of weights may put the last token on either side of the line.
    outside = set(found.tolist()) - set(expected.nonzero().flatten().tolist())
    assert len(outside) <= 1
    halves = torch.stack([logits[0] < 0.75, logits[0] >= 0.75])
    shares = torch.stack([half[found].double().mean() for half in halves])
    wanted = torch.stack([expected[half].sum() for half in halves])
    assert torch.allclose(shares, wanted, atol=0.04)


def test_penalties_equal_transformers_and_openai() -> None:
    from transformers.generation import logits_process as hf

    logits = make_logits()
    history = [5, 9, 9, 40, 41, 41, 41]  # prompt 5 9 9, output 40 41 41 41
    ids = torch.tensor([history])
    expected = hf.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    expected[0, 40] -= 0.4 + 0.9
    expected[0, 41] -= 3 * 0.4 + 0.9
    params = {"repetition_penalty": 1.7, "frequency_penalty": 0.4, "presence_penalty": 0.9}
    steps = [make_step(i, seed=i, counter=4, history=history, **params) for i in range(4000)]
    found = torch.tensor([t.token_id for t in sample(logits.expand(4000, -1), steps).tokens])
    assert chi_square_fits(found, expected.double().softmax(-1)[0], 4000)
    greedy = make_step(counter=4, history=history, temperature=0.0, **params)
    assert sample(logits, [greedy]).tokens[0].token_id == int(expected.argmax())


def test_logit_bias_forces_and_forbids_tokens() -> None:
    logits = make_logits()
    assert set(draw(logits, 50, logit_bias=((17, 100.0),)).tolist()) == {17}
    best = int(logits.argmax())
    second = int(logits.topk(2).indices[0, 1])
    step = make_step(temperature=0.0, logit_bias=((best, -100.0),))
    assert sample(logits, [step]).tokens[0].token_id == second


def test_end_tokens_are_banned_before_min_tokens_only() -> None:
    logits = make_logits()
    best = int(logits.argmax())
    for counter, expected in ((0, False), (2, False), (3, True)):
        step = make_step(counter=counter, temperature=0.0, min_tokens=3, stop_token_ids=(best, 4))
        assert (sample(logits, [step]).tokens[0].token_id == best) is expected


def test_same_seed_gives_same_tokens_whatever_else_is_in_the_batch() -> None:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"top_k": 7, "min_p": 0.05},
        {"top_p": 0.5},
        {"top_p": 0.99999},
        {"repetition_penalty": 1.2, "temperature": 0.7},
        {"num_logprobs": 3},
        {"logit_bias": ((3, 2.0),), "top_p": 0.8},
    ]
    logits = make_logits(len(kinds), vocab_size=3000)
    steps = [make_step(i, seed=100 + i, counter=i, history=[2, 7, 3], **kind) for i, kind in enumerate(kinds)]
    together = [t.token_id for t in sample(logits, steps).tokens]
    alone = [sample(logits[i : i + 1], [step]).tokens[0].token_id for i, step in enumerate(steps)]
    backwards = [t.token_id for t in sample(logits.flip(0), steps[::-1]).tokens][::-1]
    assert together == alone == backwards


def test_counter_and_seed_both_change_the_draw() -> None:
    numbers = {uniform(seed, counter) for seed in (0, 1, 2**63, -1) for counter in range(500)}
    assert len(numbers) == 2000
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2000 - 0.5) < 0.03
    assert uniform(5, 3) == uniform(5, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8}, {"top_p": 0.5, "num_logprobs": 2}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: dict[str, Any]) -> None:
    logits = make_logits(3)
    clean = sample(logits, [make_step(i, seed=i, **params) for i in range(3)])
    logits[1, 42] = bad
    result = sample(logits, [make_step(i, seed=i, **params) for i in range(3)])
    assert result.failed == ((1, NOT_FINITE),)
    assert [t for t in result.tokens] == [clean.tokens[0], clean.tokens[2]]


def test_minus_infinity_masks_a_token_and_nothing_else() -> None:
    logits = make_logits()
    logits[0, int(logits.argmax())] = float("-inf")
    assert not sample(logits, [make_step(temperature=0.0)]).failed
    assert not sample(logits, [make_step(temperature=1.0)]).failed


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-5},
        {"temperature": 1e-300},
        {"temperature": 1e3},
        {"top_k": 10**9},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"logit_bias": tuple((i, 100.0) for i in range(0, VOCAB_SIZE, 2))},
        {"logit_bias": tuple((i, -100.0) for i in range(VOCAB_SIZE))},
        {"temperature": 1e-5, "logit_bias": ((0, 100.0), (1, -100.0))},
        {"repetition_penalty": 1e-3, "temperature": 1e-5},
    ],
)
def test_extreme_values_stay_finite(params: dict[str, Any]) -> None:
    result = sample(make_logits(), [make_step(num_logprobs=2, **params)])
    assert not result.failed
    assert 0 <= result.tokens[0].token_id < VOCAB_SIZE
    assert result.tokens[0].logprob is not None
    assert math.isfinite(result.tokens[0].logprob.logprob)


def test_cold_draws_are_greedy() -> None:
    logits = make_logits()
    assert set(draw(logits, 20, temperature=1e-5).tolist()) == {int(logits.argmax())}


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = make_logits(2)
    raw = logits.log_softmax(-1)
    steps = [
        make_step(0, temperature=0.3, num_logprobs=4, logit_bias=((8, 50.0),)),
        make_step(1, temperature=0.0, num_logprobs=0),
    ]
    biased, greedy = sample(logits, steps).tokens
    assert biased.token_id == 8
    assert biased.logprob.logprob == pytest.approx(float(raw[0, 8]), abs=1e-5)
    top = raw[0].topk(4)
    assert [token_id for token_id, _ in biased.logprob.top] == top.indices.tolist()
    assert [value for _, value in biased.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert greedy.logprob.top == ()
    assert greedy.logprob.logprob == pytest.approx(float(raw[1].max()), abs=1e-5)


def test_logits_are_left_as_they_were() -> None:
    logits = make_logits(3)
    before = logits.clone()
    sample(logits, [make_step(i, temperature=0.5, logit_bias=((1, 3.0),), top_p=0.7) for i in range(3)])
    assert torch.equal(logits, before)


def test_prompt_logprobs_stop_at_the_end_of_the_prompt() -> None:
    logits = make_logits(4)
    step = SequenceStep(
        seq_id=0,
        token_ids=[10, 11, 12, 13],
        start=2,
        block_ids=(),
        is_sampled=True,
        sampling=SamplingParams(num_prompt_logprobs=1),
        seed=0,
        num_prompt_tokens=5,
        num_output_tokens=1,
        history=[8, 9, 10, 11, 12, 13],
    )
    found = prompt_logprobs(logits, step)
    assert [entry.token_id for entry in found] == [11, 12]
    assert found[0].logprob == pytest.approx(float(logits.log_softmax(-1)[0, 11]), abs=1e-5)
    assert len(found[0].top) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_and_fp32_logits_are_taken(dtype: Any) -> None:
    logits = make_logits(2).to(dtype)
    tokens = sample(logits, [make_step(0, temperature=0.0), make_step(1, temperature=0.0, num_logprobs=1)]).tokens
    assert [t.token_id for t in tokens] == logits.argmax(-1).tolist()
