"""Sequences with a common beginning: found from block tables, worth sharing or not, and attended to as if apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton kernels need triton")

from mxn_kernels import ops
from mxn_kernels.kv_cache import KVCache
from mxn_kernels.shared_prefix import PrefixGroup, SharedPrefix, find_groups, plan_shared_prefix, saved_bytes
from mxn_kernels.testing.batches import guard_is_intact, make_batch
from mxn_kernels.testing.tolerances import ATTENTION, LSE, error
from mxn_kernels.triton.launch import record_launches

RARE = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def trees(draw: st.DrawFn) -> list[list[int]]:
    """Block tables of sequences that branch off each other, or stand alone."""
    tables: list[list[int]] = []
    for row in range(draw(st.integers(1, 7))):
        parent = draw(st.sampled_from([[], *tables]))
        kept = draw(st.integers(0, len(parent)))
        tables.append([*parent[:kept], *range(100 * row, 100 * row + draw(st.integers(0, 3)))])
    return tables


@given(trees())
@settings(max_examples=200, deadline=None)
def test_groups_save_as_much_as_any_grouping(tables: list[list[int]]) -> None:
    groups = find_groups(*as_tensors(tables), 16)
    rows = [row for group in groups for row in group.members]
    assert len(rows) == len(set(rows))
    for group in groups:
        assert len(group.members) > 1
        first = tables[group.members[0]][: group.num_blocks]
        assert len(first) == group.num_blocks
        assert all(tables[row][: group.num_blocks] == first for row in group.members)
    assert sum((len(g.members) - 1) * g.num_blocks for g in groups) == most_saved(tables, 0)


def test_a_short_common_beginning_does_not_hide_long_ones() -> None:
    """All start with the same block; two families share much more."""
    tables = [[1, 2, 3, 4, row] for row in range(50, 53)] + [[1, 12, 13, 14, row] for row in range(60, 63)]
    assert find_groups(*as_tensors(tables), 16) == [PrefixGroup(4, (0, 1, 2)), PrefixGroup(4, (3, 4, 5))]


def test_only_full_blocks_are_shared() -> None:
    table = torch.tensor([[1, 2, 3], [1, 2, 3]], dtype=torch.int32)
    contexts = torch.tensor([40, 33], dtype=torch.int32)
    assert find_groups(table, contexts, 16) == [PrefixGroup(2, (0, 1))]


def test_sharing_is_planned_where_it_saves_traffic() -> None:
    cache = KVCache.allocate(2048, block_size=16, num_kv_heads=8, key_dim=128, device="meta")
    long = torch.cat([torch.arange(512).repeat(64, 1), 600 + torch.arange(64 * 16).view(64, 16)], 1).int()
    group = PrefixGroup(512, tuple(range(64)))
    # 64 members read 32 MiB each; 4 tiles of 64 rows read them 4 times; partial results are 64 x 32 x 129 fp32, four
    # times.
    assert saved_bytes(group, cache, 32) == 60 * (32 << 20) - 4 * 64 * 32 * 129 * 4
    on_cpu = KVCache.allocate(1, block_size=16, num_kv_heads=8, key_dim=128)
    plan = plan_shared_prefix(long, torch.full((64,), 8448, dtype=torch.int32), on_cpu, num_heads=32)
    assert plan is not None
    assert plan.groups == (group,)
    assert plan.max_prefix == 8192
    few = plan_shared_prefix(long[:2], torch.full((2,), 8448, dtype=torch.int32), on_cpu, num_heads=32)
    assert few is not None, "two sequences with 8k in common save 32 MiB"
    assert plan_shared_prefix(long[:64, 510:], torch.full((64,), 288, dtype=torch.int32), on_cpu, num_heads=32) is None


@pytest.mark.parametrize("rules", [{}, {"sinks": True}, {"softcap": 2.0}, {"num_splits": 3}], ids=str)
def test_shared_decode_equals_reference(rules: dict, device: str) -> None:
    """A group of three, a group of two, a sequence alone, a padded row; tails of none, some and several blocks."""
    contexts = (50, 48, 100, 20, 64, 33, 0)
    batch = make_batch(contexts, num_heads=4, shared_blocks=[(3, 0, 1, 2), (2, 4, 5)], device=device)
    if rules.get("sinks"):
        rules = {"sinks": torch.linspace(-1, 2, 4, device=device)}
    check(batch, rules)


@RARE
@given(
    prefix=st.integers(1, 4),
    tails=st.lists(st.integers(0, 40), min_size=2, max_size=5),
    alone=st.lists(st.integers(0, 40), max_size=2),
    kv_heads=st.sampled_from([1, 2]),
)
def test_shared_decode_equals_float64_for_any_groups(
    prefix: int, tails: list, alone: list, kv_heads: int, device: str
) -> None:
    contexts = [16 * prefix + tail for tail in tails] + alone
    group = (prefix, *range(len(tails)))
    check(make_batch(contexts, num_heads=4, num_kv_heads=kv_heads, shared_blocks=[group], device=device), {})


def test_shared_decode_reads_fp8_with_scales(device: str) -> None:
    cache = {"cache_dtype": torch.float8_e4m3fn, "scaling": "token_head"}
    check(make_batch((50, 70), shared_blocks=[(2, 0, 1)], device=device, **cache), {})


def test_more_query_rows_than_a_tile_holds_are_divided(device: str) -> None:
    """Six members with eight heads each are 48 rows; a tile has 16."""
    batch = make_batch([40] * 6, num_heads=8, shared_blocks=[(2, *range(6))], device=device)
    check(batch, {})


def test_plan_of_another_batch_is_refused(device: str) -> None:
    batch = make_batch((50, 70), shared_blocks=[(2, 0, 1)], device=device)
    prefix = SharedPrefix.of([PrefixGroup(2, (0, 1))], num_seqs=3, block_size=16, device=device)
    with pytest.raises(ValueError, match="the prefix plan is for 3 sequences, found 2"):
        ops.shared_prefix_decode(**batch.arguments(), prefix=prefix)
    wrong = SharedPrefix.of([PrefixGroup(3, (0, 1))], num_seqs=2, block_size=16, device=device)
    with pytest.raises(ValueError, match="row 1 does not share its first 3 blocks"):
        ops.shared_prefix_decode(**batch.arguments(), prefix=wrong, check_ids=True)
    with pytest.raises(ValueError, match="must be different rows"):
        SharedPrefix.of([PrefixGroup(1, (0, 1)), PrefixGroup(1, (1,))], num_seqs=2, block_size=16, device=device)


def check(batch, rules: dict) -> None:
    groups = find_groups(batch.block_table.cpu(), batch.context_lens.cpu(), 16)
    prefix = SharedPrefix.of(groups, num_seqs=len(batch.context_lens), block_size=16, device=batch.query.device)
    query = batch.query.new_full((prefix.num_seqs, *batch.query.shape[1:]), float("nan"))
    query[batch.query_starts.diff() == 1] = batch.query
    arguments = {**batch.arguments(), **rules, "query": query, "return_lse": True}
    with record_launches() as launches:
        found = ops.shared_prefix_decode(**arguments, prefix=prefix, check_ids=True)
    assert [launch.name for launch in launches] == ["prefix_kernel", "paged_decode_kernel", "merge_kernel"]
    wanted = ops.shared_prefix_decode(**arguments, prefix=prefix, implementation="reference")
    assert error(found[0], wanted[0]) <= ATTENTION[torch.float32]
    assert error(found[1], wanted[1]) <= LSE[torch.float32]
    assert guard_is_intact(batch.cache)


def as_tensors(tables: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max([1, *map(len, tables)])
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return torch.tensor(padded, dtype=torch.int32), torch.tensor([16 * len(t) + 3 for t in tables], dtype=torch.int32)


def most_saved(tables: list[list[int]], depth: int) -> int:
    """By trying: at each point of the tree, all that pass form one group, or their branches do better apart."""
    branches: dict[int, list[list[int]]] = {}
    for table in tables:
        if len(table) > depth:
            branches.setdefault(table[depth], []).append(table)
    apart = sum(most_saved(branch, depth + 1) for branch in branches.values() if len(branch) > 1)
    return max((len(tables) - 1) * depth, apart)
