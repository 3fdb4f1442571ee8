"""Attention kernels against their float64 references, with caches full of NaN wherever nothing was written."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from mxn_kernels import ops
from mxn_kernels.testing.batches import Batch, guard_is_intact, make_batch, swap_heads_and_tokens
from mxn_kernels.testing.tolerances import ATTENTION, LSE, error
from mxn_kernels.triton.launch import record_launches

# One token, a full block, a block and one, nothing, and several blocks with a rest.
CONTEXTS = (1, 16, 17, 0, 45)
QUERIES = (1, 5, 17, 0, 20)

FORMS = {
    "group 1": {"num_heads": 2, "num_kv_heads": 2},
    "group 8": {"num_heads": 8, "num_kv_heads": 1},
    "group 3 of two": {"num_heads": 6, "num_kv_heads": 2},
    "head size 80": {"key_dim": 80},
    "head size 128": {"key_dim": 128},
    "head size 256": {"key_dim": 256},
    "keys 48, values 32": {"key_dim": 48, "value_dim": 32},
    "blocks of 32": {"block_size": 32},
    "blocks of 24": {"block_size": 24},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "fp8, one scale": {"dtype": torch.float16, "cache_dtype": torch.float8_e4m3fn, "scaling": "tensor"},
    "fp8, a scale per token and head": {"cache_dtype": torch.float8_e4m3fn, "scaling": "token_head", "num_kv_heads": 2},
    "fp8, no scale": {"dtype": torch.bfloat16, "cache_dtype": torch.float8_e4m3fn},
}
RULES = {
    "plain": {},
    "window 1": {"window": 1},
    "window 7": {"window": 7},
    "window 20": {"window": 20},
    "window 100": {"window": 100},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 20, "softcap": 2.0, "sinks": True},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_decode_equals_reference(form: dict, device: str) -> None:
    batch = make_batch(CONTEXTS, device=device, **form)
    check_decode(batch, {"num_splits": 2}, "paged_decode_kernel", "merge_kernel")


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_decode_follows_rules(rules: dict, device: str) -> None:
    batch = make_batch(CONTEXTS, device=device)
    check_decode(batch, with_sinks(rules, batch))


def test_decode_with_one_split_writes_its_result_at_once(device: str) -> None:
    batch = make_batch(CONTEXTS, device=device)
    check_decode(batch, {"num_splits": 1, "sinks": torch.ones(4, device=device)}, "paged_decode_kernel")


@pytest.mark.parametrize("num_splits", [2, 5, 40])
def test_decode_splits_are_merged(num_splits: int, device: str) -> None:
    """40 splits are more than tiles, so most see nothing."""
    batch = make_batch(CONTEXTS, device=device)
    check_decode(batch, {"num_splits": num_splits, "sinks": torch.ones(4, device=device)})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_prefill_equals_reference(form: dict, device: str) -> None:
    check_prefill(make_batch(CONTEXTS, QUERIES, device=device, **form), {})


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_prefill_follows_rules(rules: dict, device: str) -> None:
    batch = make_batch((45, 3, 70), (20, 3, 1), device=device)
    check_prefill(batch, with_sinks(rules, batch))


def test_prefill_of_single_tokens_equals_decode(device: str) -> None:
    batch = make_batch(CONTEXTS, device=device)
    rows = [row for row, context in enumerate(CONTEXTS) if context]
    decoded = ops.paged_decode(**{**batch.arguments(), "query": pad_queries(batch)})
    prefilled = ops.ragged_prefill(**batch.arguments(), query_starts=batch.query_starts)
    assert error(prefilled, decoded[rows]) <= ATTENTION[torch.float32]


def test_attention_reads_a_cache_with_tokens_outside_heads(device: str) -> None:
    batch = make_batch(CONTEXTS, QUERIES, num_kv_heads=2, device=device)
    swapped = {**batch.arguments(), "cache": swap_heads_and_tokens(batch.cache), "query_starts": batch.query_starts}
    wanted = ops.ragged_prefill(**batch.arguments(), query_starts=batch.query_starts)
    assert torch.equal(ops.ragged_prefill(**swapped), wanted)


def test_prefill_leaves_padding_alone(device: str) -> None:
    batch = make_batch((20,), (7,), device=device)
    padded = torch.cat([batch.query, torch.full_like(batch.query[:3], float("nan"))])
    out = torch.full((10, 4, 64), 7.0, device=device)
    ops.ragged_prefill(**{**batch.arguments(), "query": padded}, query_starts=batch.query_starts, out=out)
    assert (out[7:] == 7.0).all()
    assert error(out[:7], ops.ragged_prefill(**batch.arguments(), query_starts=batch.query_starts)) == 0


def test_queries_may_have_any_strides(device: str) -> None:
    batch = make_batch((20, 5), device=device)
    strided = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    found = ops.paged_decode(**{**batch.arguments(), "query": strided})
    assert torch.equal(found, ops.paged_decode(**batch.arguments()))


def test_fixed_splits_make_a_sequence_independent_of_its_batch(device: str) -> None:
    batch = make_batch((45, 17, 33), device=device)
    together = ops.paged_decode(**batch.arguments(), num_splits=4)
    for row in range(3):
        single = {
            n: t[row : row + 1] for n, t in batch.arguments().items() if n in ("query", "block_table", "context_lens")
        }
        alone = ops.paged_decode(**{**batch.arguments(), **single}, num_splits=4)
        assert torch.equal(alone[0], together[row])


def test_prefill_is_independent_of_its_batch(device: str) -> None:
    batch = make_batch((45, 17), (20, 17), device=device)
    together = ops.ragged_prefill(**batch.arguments(), query_starts=batch.query_starts)
    alone = ops.ragged_prefill(
        batch.query[20:],
        batch.cache,
        batch.block_table[1:],
        torch.tensor([0, 17], dtype=torch.int32, device=device),
        batch.context_lens[1:],
        scaling=batch.scaling,
    )
    assert torch.equal(alone, together[20:])


def test_empty_batches_come_back_empty(device: str) -> None:
    batch = make_batch((5,), device=device)
    nothing = {n: t[:0] for n, t in batch.arguments().items() if n in ("query", "block_table", "context_lens")}
    arguments = {**batch.arguments(), **nothing}
    assert ops.paged_decode(**arguments).shape == (0, 4, 64)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    assert ops.ragged_prefill(**arguments, query_starts=starts).shape == (0, 4, 64)


def check_decode(batch: Batch, rules: dict, *kernels: str) -> None:
    arguments = {**batch.arguments(), **rules, "query": pad_queries(batch), "return_lse": True}
    with record_launches() as launches:
        found = ops.paged_decode(**arguments)
    if kernels:
        assert tuple(launch.name for launch in launches) == kernels
    check(batch, found, ops.paged_decode(**arguments, implementation="reference"))


def check_prefill(batch: Batch, rules: dict) -> None:
    arguments = {**batch.arguments(), **rules, "query_starts": batch.query_starts, "return_lse": True}
    with record_launches() as launches:
        found = ops.ragged_prefill(**arguments)
    assert [launch.name for launch in launches] == ["ragged_prefill_kernel"]
    check(batch, found, ops.ragged_prefill(**arguments, implementation="reference"))


def check(batch: Batch, found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    dtype = batch.query.dtype
    assert error(found[0], wanted[0]) <= ATTENTION[dtype]
    assert error(found[1], wanted[1]) <= LSE[dtype]
    assert guard_is_intact(batch.cache)


def pad_queries(batch: Batch) -> torch.Tensor:
    """One row per sequence, also for empty ones, as a padded decode batch has."""
    lengths = batch.query_starts.diff().long()
    padded = batch.query.new_full((lengths.shape[0], *batch.query.shape[1:]), float("nan"))
    padded[lengths == 1] = batch.query
    return padded


def with_sinks(rules: dict, batch: Batch) -> dict:
    if not rules.get("sinks"):
        return rules
    return {**rules, "sinks": torch.linspace(-1, 2, batch.query.shape[1], device=batch.query.device)}
