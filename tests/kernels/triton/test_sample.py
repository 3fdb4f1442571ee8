"""Sampling: the same token as by sorting, the same generator as mxn's CPU sampler, the right distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton kernels need triton")

from mxn_kernels import ops
from mxn_kernels.ops.sample import random_bits, sample_reference
from mxn_kernels.triton.launch import record_launches

RARE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RARE
@given(
    vocab_size=st.integers(1, 300),
    spread=st.sampled_from([0.0, 0.5, 5.0, 40.0]),
    temperature=st.sampled_from([0.0, 1e-7, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 50, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0, 2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    has_ties=st.booleans(),
)
def test_draws_what_sorting_draws(vocab_size, spread, temperature, top_k, top_p, min_p, seed, has_ties, device) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn((2, vocab_size), generator=generator) * spread
    if has_ties:
        logits = logits.round()
    rules = make_rules(2, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, device=device)
    logits = logits.to(device)
    with record_launches() as launches:
        found = ops.sample(logits, **rules)
    assert [launch.name for launch in launches] == ["sample_kernel"]
    assert found.tolist() == ops.sample(logits, **rules, implementation="reference").tolist()


def test_vocabularies_of_several_tiles_are_drawn_from(device: str) -> None:
    logits = torch.randn((3, 9000), generator=torch.Generator().manual_seed(0)).to(device)
    for rules in ({}, {"top_k": 40}, {"top_p": 0.95}):
        tensors = make_rules(3, **rules, device=device)
        wanted = ops.sample(logits, **tensors, implementation="reference")
        assert ops.sample(logits, **tensors).tolist() == wanted.tolist()


def test_draw_does_not_depend_on_the_batch(device: str) -> None:
    logits = torch.randn((4, 200), generator=torch.Generator().manual_seed(1)).to(device)
    rules = make_rules(4, top_p=0.9, device=device)
    together = ops.sample(logits, **rules)
    for row in range(4):
        alone = ops.sample(logits[row : row + 1], **{name: tensor[row : row + 1] for name, tensor in rules.items()})
        assert alone[0] == together[row]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_without_finite_logits_yield_no_token(bad: float, device: str) -> None:
    logits = torch.zeros((3, 50), device=device)
    logits[1, 20] = bad
    logits[2] = float("-inf")
    for temperature in (0.0, 1.0):
        rules = make_rules(3, temperature=temperature, device=device)
        found = ops.sample(logits, **rules).tolist()
        assert found[0] >= 0
        assert found[1:] == [-1, -1]
        assert ops.sample(logits, **rules, implementation="reference").tolist() == found


def test_banned_tokens_are_never_drawn(device: str) -> None:
    logits = torch.full((8, 50), float("-inf"), device=device)
    logits[:, 7] = 0.0
    logits[:, 31] = -1.0
    assert set(ops.sample(logits, **make_rules(8, temperature=5.0, device=device)).tolist()) <= {7, 31}


def test_reference_draws_tokens_as_often_as_they_are_likely() -> None:
    """20,000 draws with consecutive steps: each count within five standard deviations."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 20_000
    rules = make_rules(count, device="cpu")
    out = torch.empty(count, dtype=torch.int64)
    sample_reference(logits.expand(count, -1), **rules, out=out)
    for token, likelihood in enumerate(logits.softmax(0).tolist()):
        spread = (count * likelihood * (1 - likelihood)) ** 0.5
        assert abs(int((out == token).sum()) - count * likelihood) < 5 * spread


@given(seed=st.integers(-(2**63), 2**64 - 1), step=st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_generator_is_that_of_the_cpu_sampler(seed: int, step: int) -> None:
    sampler = pytest.importorskip("mxn.runner.sampler", reason="needs mxn installed", exc_type=ImportError)
    assert random_bits(seed, step) / 2**64 == sampler.uniform(seed, step)


def make_rules(
    count: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=3, device
) -> dict[str, torch.Tensor]:
    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    return {
        "temperatures": full(temperature, torch.float32),
        "top_k": full(top_k, torch.int32),
        "top_p": full(top_p, torch.float32),
        "min_p": full(min_p, torch.float32),
        "seeds": full(seed, torch.int64),
        "steps": torch.arange(count, dtype=torch.int32, device=device),
    }
