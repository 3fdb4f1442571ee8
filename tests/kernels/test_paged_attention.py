"""Paged attention against the float64 reference over uneven batches, with NaN wherever nothing may be touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.cpu_cache import KvDtype, LayerCache
from mxn_kernels.paged_attention import PagedBatch, paged_attention, paged_attention_reference

pytestmark = pytest.mark.torch

TOLERANCE = 2e-5
"""Both sides read the same half-precision cache; float32 sums of unit-size terms differ in the last bits."""


@dataclass
class Case:
    """One step: two equal caches and the operands. Slots that hold no token are NaN."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: LayerCache
    twin: LayerCache
    batch: PagedBatch
    options: dict

    def kernel(self, workspace: Workspace) -> torch.Tensor:
        operands = (self.query, self.key, self.value, self.cache, self.batch)
        return paged_attention(*operands, **self.options, workspace=workspace)

    def reference(self) -> torch.Tensor:
        return paged_attention_reference(self.query, self.key, self.value, self.twin, self.batch, **self.options)


def make_case(
    lengths: Sequence[tuple[int, int]],
    *,
    key_dim: int = 64,
    value_dim: int | None = None,
    num_kv_heads: int = 2,
    group: int = 1,
    block_size: int = 16,
    seed: int = 0,
    has_sinks: bool = False,
    kv_dtype: KvDtype = "fp16",
    **options: object,
) -> Case:
    """lengths: (query, context) per sequence. Blocks are shuffled; spare blocks and unwritten slots hold NaN."""
    value_dim = value_dim or key_dim
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    needed = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(needed) + 5
    ids = torch.randperm(num_blocks, generator=generator).int()
    table = torch.zeros(len(lengths), max([*needed, 1]), dtype=torch.int32)
    shape = {"block_size": block_size, "num_kv_heads": num_kv_heads, "key_dim": key_dim, "value_dim": value_dim}
    caches = [LayerCache.allocate(num_blocks=num_blocks, kv_dtype=kv_dtype, **shape) for _ in range(2)]
    for cache in caches:
        cache.keys.fill_(255)  # NaN as a half and as a float
        cache.values.fill_(255)
    slots: list[int] = []
    taken = 0
    for row, (queries, context) in enumerate(lengths):
        table[row, : needed[row]] = ids[taken : taken + needed[row]]
        taken += needed[row]
        places = [int(table[row, p // block_size]) * block_size + p % block_size for p in range(context)]
        slots += places[context - queries :]
        for slot in places[: context - queries]:
            keys, values = random(num_kv_heads, key_dim), random(num_kv_heads, value_dim)
            for cache in caches:
                cache.put(slot, keys, values)
    num_tokens = len(slots)
    starts = torch.tensor([0, *(queries for queries, _ in lengths)]).cumsum(0).int()
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    batch = PagedBatch(starts, contexts, table, torch.tensor(slots, dtype=torch.int32))
    # Heads as views of one token-major tensor, which is how transformers hands them over.
    query = random(num_tokens, num_kv_heads * group, key_dim).transpose(0, 1)
    key, value = (random(num_tokens, num_kv_heads, dim).transpose(0, 1) for dim in (key_dim, value_dim))
    sinks = random(num_kv_heads * group) if has_sinks else None
    return Case(query, key, value, *caches, batch, {"scaling": key_dim**-0.5, "sinks": sinks, **options})


both_types = pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])

MIXED = [(1, 1), (16, 16), (17, 17), (1, 16), (1, 17), (5, 40), (0, 3), (1, 700), (70, 300), (2, 1100), (1, 513)]


def check(case: Case, workspace: Workspace) -> None:
    found, expected = case.kernel(workspace), case.reference()
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    # Bit for bit: what was written, and the NaN around it.
    assert torch.equal(case.cache.keys, case.twin.keys)
    assert torch.equal(values_of(case.cache), values_of(case.twin))


def values_of(cache: LayerCache) -> torch.Tensor:
    """The bytes of the values without the padding of their rows."""
    head, size = (64, 1) if cache.kv_dtype == "int8" else (0, 2)
    rows = cache.values[..., head:].unflatten(-1, (16, -1))[..., : cache.value_dim * size]
    return torch.cat([cache.values[..., :head], rows.flatten(-2)], -1)


@both_types
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("key_dim", [8, 16, 20, 64, 80, 128, 256])
def test_head_sizes_and_groups(workspace: Workspace, key_dim: int, group: int, kv_dtype: KvDtype) -> None:
    check(make_case(MIXED, key_dim=key_dim, group=group, kv_dtype=kv_dtype), workspace)


@both_types
@pytest.mark.parametrize("group", [2, 5, 6, 7, 12, 71])
def test_odd_groups(workspace: Workspace, group: int, kv_dtype: KvDtype) -> None:
    check(make_case([(1, 30), (9, 50), (1, 600)], num_kv_heads=1, group=group, kv_dtype=kv_dtype), workspace)


@both_types
@pytest.mark.parametrize(("key_dim", "value_dim"), [(192, 128), (8, 40), (64, 20), (1, 1)])
def test_keys_and_values_of_different_size(
    workspace: Workspace, key_dim: int, value_dim: int, kv_dtype: KvDtype
) -> None:
    check(make_case(MIXED, key_dim=key_dim, value_dim=value_dim, group=2, kv_dtype=kv_dtype), workspace)


@both_types
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 65, 512, 5000])
def test_window(workspace: Workspace, window: int, kv_dtype: KvDtype) -> None:
    check(make_case(MIXED, group=3, window=window, kv_dtype=kv_dtype), workspace)


@both_types
@pytest.mark.parametrize("softcap", [1.0, 50.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_softcap_sinks_and_window_together(
    workspace: Workspace, has_sinks: bool, window: int | None, softcap: float, kv_dtype: KvDtype
) -> None:
    check(make_case(MIXED, group=4, window=window, softcap=softcap, has_sinks=has_sinks, kv_dtype=kv_dtype), workspace)


@both_types
def test_sinks_alone(workspace: Workspace, kv_dtype: KvDtype) -> None:
    check(make_case(MIXED, group=4, has_sinks=True, kv_dtype=kv_dtype), workspace)


@both_types
@pytest.mark.parametrize("block_size", [32, 48, 128])
def test_block_sizes(workspace: Workspace, block_size: int, kv_dtype: KvDtype) -> None:
    check(make_case(MIXED, group=3, block_size=block_size, window=100, kv_dtype=kv_dtype), workspace)


@both_types
@pytest.mark.parametrize("context", [511, 512, 513, 1024, 1025, 3000])
def test_decode_over_chunk_edges(workspace: Workspace, context: int, kv_dtype: KvDtype) -> None:
    check(make_case([(1, context)], group=3, kv_dtype=kv_dtype), workspace)


@both_types
@pytest.mark.parametrize("queries", [2, 15, 16, 63, 64, 65, 193])
@pytest.mark.parametrize("before", [0, 1, 63, 64, 130])
def test_chunked_prefill(workspace: Workspace, before: int, queries: int, kv_dtype: KvDtype) -> None:
    check(make_case([(queries, before + queries)], group=3, kv_dtype=kv_dtype), workspace)


def test_empty_batch(workspace: Workspace) -> None:
    case = make_case([(0, 5), (0, 0)])
    assert case.kernel(workspace).shape == (0, 2, 64)
    case = make_case([])
    assert case.kernel(workspace).shape == (0, 2, 64)


@both_types
def test_slot_minus_one_is_not_written(workspace: Workspace, kv_dtype: KvDtype) -> None:
    case = make_case([(1, 20), (4, 4)], kv_dtype=kv_dtype)
    slots = case.batch.tensors[3]
    before = int(slots[0])
    slots[0] = -1
    case.cache.keys.zero_(), case.twin.keys.zero_(), case.cache.values.zero_(), case.twin.values.zero_()
    check(case, workspace)
    keys, _ = case.cache.gather(torch.tensor([before // 16]), 16)
    assert (keys[:, before % 16] == 0).all()


@both_types
@pytest.mark.parametrize("window", [None, 100])
def test_row_does_not_depend_on_the_batch_or_on_threads(
    workspace: Workspace, window: int | None, kv_dtype: KvDtype
) -> None:
    """Each sequence alone, on one thread, gives the very bits it gives in company on two."""
    case = make_case(MIXED, group=3, window=window, has_sinks=True, kv_dtype=kv_dtype)
    together = case.kernel(workspace)
    starts, contexts, table, slots = case.batch.tensors
    alone = Workspace(1, workspace.library.isa)
    for row in range(len(MIXED)):
        first, last = int(starts[row]), int(starts[row + 1])
        own = torch.tensor([0, last - first], dtype=torch.int32)
        case.batch = PagedBatch(own, contexts[row : row + 1], table[row : row + 1], slots[first:last])
        part = Case(
            *(t[:, first:last] for t in (case.query, case.key, case.value)),
            case.cache,
            case.twin,
            case.batch,
            case.options,
        )
        assert torch.equal(part.kernel(alone), together[first:last])


@both_types
def test_prefill_does_not_depend_on_how_it_is_cut(workspace: Workspace, kv_dtype: KvDtype) -> None:
    case = make_case([(150, 150)], group=3, kv_dtype=kv_dtype)
    whole = case.kernel(workspace)
    _, _, table, slots = case.batch.tensors
    for cut in (2, 33, 64, 100, 148):
        for first, last in ((0, cut), (cut, 150)):
            lens = torch.tensor([0, last - first], dtype=torch.int32), torch.tensor([last], dtype=torch.int32)
            batch = PagedBatch(*lens, table, slots[first:last])
            rows = (t[:, first:last] for t in (case.query, case.key, case.value))
            part = paged_attention(*rows, case.cache, batch, **case.options, workspace=workspace)
            assert torch.equal(part, whole[first:last])


@both_types
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_sequence_spoils_no_other(workspace: Workspace, broken: float, kv_dtype: KvDtype) -> None:
    lengths = [(1, 40), (20, 40), (1, 600), (1, 40), (20, 40)]
    case = make_case(lengths, group=3, kv_dtype=kv_dtype)
    expected = case.kernel(workspace)
    starts = case.batch.tensors[0]
    for row in (0, 1, 2):
        case.query[:, int(starts[row])] = broken
        case.key[:, int(starts[row])] = broken
    found = case.kernel(workspace)
    for row in (0, 1, 2):
        assert found[int(starts[row])].isnan().all()
    clean = int(starts[3])
    assert torch.equal(found[clean:], expected[clean:])


def test_large_scores_stay_finite(workspace: Workspace) -> None:
    case = make_case([(1, 600), (30, 90)], group=3)
    case.query.mul_(1e4)
    found, expected = case.kernel(workspace), case.reference()
    assert found.isfinite().all()
    # Scores near 1e5 carry an absolute float32 error of 1e-2, which is a relative error of the weights.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


FAULTS = {
    "block past the end": (2, (0, 0), 10_000, r"block_table row 0 names block 10000; blocks are 0 to \d+"),
    "negative block": (2, (1, 1), -1, "block_table row 1 names block -1"),
    "slot past the end": (3, 1, 10**6, r"slot_mapping\[1\] is 1000000"),
    "slot below -1": (3, 0, -2, r"slot_mapping\[0\] is -2"),
    "context over the table": (1, 0, 10_000, r"context_lens\[0\] is 10000"),
    "context under the queries": (1, 1, 3, r"context_lens\[1\] is 3"),
    "negative context": (1, 0, -5, r"context_lens\[0\] is -5"),
    "starts that fall": (0, 1, 9, r"query_starts\[2\] is 6"),
    "starts that do not begin at 0": (0, 0, 1, r"query_starts\[0\] is 1"),
    "starts that miss tokens": (0, 2, 5, r"query_starts\[2\] is 5"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_index_outside_the_cache_is_refused_and_nothing_written(workspace: Workspace, fault: str) -> None:
    tensor, place, value, message = FAULTS[fault]
    case = make_case([(1, 20), (5, 30)])
    before = case.cache.keys.clone()
    case.batch.tensors[tensor][place] = value
    with pytest.raises(ValueError, match=message):
        case.kernel(workspace)
    assert torch.equal(case.cache.keys, before)


def test_table_entries_past_the_context_are_not_followed(workspace: Workspace) -> None:
    case = make_case([(1, 20), (1, 90)])
    case.batch.tensors[2][0, 2:] = 10**6
    check(case, workspace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 64)}, r"query must be float32 \(2, 1, 64\)"),
        ({"query": torch.zeros(3, 1, 64)}, "multiple of 2 KV heads, found 3"),
        ({"query": torch.zeros(0, 1, 64)}, "multiple of 2 KV heads, found 0"),
        ({"key": torch.zeros(2, 1, 32)}, r"key must be float32 \(2, 1, 64\)"),
        ({"value": torch.zeros(2, 1, 64).half()}, "value must be float32"),
        ({"query": torch.zeros(2, 64, 1).transpose(1, 2).expand(2, 1, 64)[..., ::1]}, None),
        ({"window": 0}, "window must be None or at least 1, found 0"),
        ({"softcap": -1.0}, "softcap must be None or positive"),
        ({"sinks": torch.zeros(3)}, r"sinks must be float32 \(2,\)"),
    ],
)
def test_unfit_operand_is_refused(workspace: Workspace, change: dict, message: str | None) -> None:
    case = make_case([(1, 20)])
    for name, value in change.items():
        if name in ("query", "key", "value"):
            setattr(case, name, value)
        else:
            case.options[name] = value
    if message is None:
        case.kernel(workspace)
        return
    with pytest.raises(ValueError, match=message):
        case.kernel(workspace)


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_size": 8},
        {"block_size": 24},
        {"num_blocks": 0},
        {"key_dim": 0},
        {"kv_dtype": "fp8"},
        {"kv_dtype": "int8", "key_dim": 1025},
    ],
)
def test_unfit_cache_is_refused(sizes: dict) -> None:
    whole = {"num_blocks": 2, "block_size": 16, "num_kv_heads": 1, "key_dim": 8, "value_dim": 8}
    with pytest.raises(ValueError, match="found"):
        LayerCache.allocate(**{**whole, **sizes})


def test_batch_of_another_type_is_refused() -> None:
    i32 = {"dtype": torch.int32}
    with pytest.raises(ValueError, match="context_lens must be contiguous int32"):
        PagedBatch(torch.zeros(2, **i32), torch.zeros(1), torch.zeros(1, 1, **i32), torch.zeros(0, **i32))


def test_bytes_per_block_is_what_a_block_takes() -> None:
    shape = {"block_size": 32, "num_kv_heads": 3, "key_dim": 20, "value_dim": 40}
    for kv_dtype in ("fp16", "int8"):
        cache = LayerCache.allocate(num_blocks=7, kv_dtype=kv_dtype, **shape)
        assert LayerCache.bytes_per_block(kv_dtype=kv_dtype, **shape) * 7 == cache.keys.numel() + cache.values.numel()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_eight_bit_rows_are_within_half_a_step(workspace: Workspace, size: float) -> None:
    """Each token by its own largest value: a small row beside a large one keeps its digits."""
    case = make_case([(40, 40)], kv_dtype="int8")
    case.key[:, ::2] *= size
    case.value[:, 1::2] *= size
    case.kernel(workspace)
    keys, values = case.cache.gather(case.batch.tensors[2][0, :3], 40)
    for stored, given in ((keys, case.key), (values, case.value)):
        step = given.abs().amax(-1, keepdim=True) / 127
        assert ((stored - given).abs() <= 0.501 * step).all()
