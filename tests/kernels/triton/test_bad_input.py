"""What wrappers refuse, and in which words."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from mxn_kernels import ops
from mxn_kernels.kv_cache import KVCache
from mxn_kernels.target import Target
from mxn_kernels.testing.batches import make_batch

FAULTS = {
    "dtype": (
        lambda a: a.update(query=a["query"].double()),
        "query must be float16 or bfloat16 or float32, found float64",
    ),
    "other dtype": (
        lambda a: a.update(query=a["query"].half()),
        "the cache must be float16 like the query, or fp8; found float32",
    ),
    "stride": (
        lambda a: a.update(query=a["query"].transpose(1, 2).contiguous().transpose(1, 2)),
        r"query must be contiguous in its last dimension, found strides \(256, 1, 4\)",
    ),
    "head size": (
        lambda a: a.update(query=a["query"][..., :32]),
        r"query must have shape \(any, any, 64\), found \(2, 4, 32\)",
    ),
    "heads": (lambda a: a.update(query=a["query"][:, :3]), "query heads must be a multiple of 2 KV heads, found 3"),
    "no heads": (lambda a: a.update(query=a["query"][:, :0]), "query heads must be a multiple of 2 KV heads, found 0"),
    "rows": (lambda a: a.update(query=a["query"][:1]), r"query must have one row per sequence \(2\), found 1"),
    "table": (
        lambda a: a.update(block_table=a["block_table"][:1]),
        r"block_table must have shape \(2, any\), found \(1, 2\)",
    ),
    "index dtype": (
        lambda a: a.update(context_lens=a["context_lens"].long()),
        "context_lens must be int32, found int64",
    ),
    "window": (lambda a: a.update(window=0), "window must be None or at least 1, found 0"),
    "softcap": (lambda a: a.update(softcap=-1.0), r"softcap must be None or positive, found -1.0"),
    "sinks": (lambda a: a.update(sinks=torch.zeros(3)), r"sinks must have shape \(4\), found \(3,\)"),
    "scaling": (lambda a: a.update(scaling=0.0), "scaling must be positive, found 0.0"),
    "splits": (lambda a: a.update(num_splits=0), "num_splits must be None or at least 1, found 0"),
    "out": (lambda a: a.update(out=torch.empty(2, 4, 32)), r"out must have shape \(2, 4, 64\), found \(2, 4, 32\)"),
    "name": (
        lambda a: a.update(implementation="cutlass"),
        "paged_decode has no implementation named 'cutlass'; registered: triton",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_decode_refuses(name: str) -> None:
    change, message = FAULTS[name]
    batch = make_batch((20, 5), num_kv_heads=2)
    arguments = batch.arguments()
    change(arguments)
    with pytest.raises(ValueError, match=message):
        ops.paged_decode(**arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("block_table", 99, r"block_table row 0 names block 99; blocks are 0 to 6 \(exclusive\)"),
        ("block_table", -1, "block_table row 0 names block -1"),
        ("context_lens", 33, r"context_lens\[0\] is 33; its row of the block table holds 0 to 32 tokens"),
        ("context_lens", -1, r"context_lens\[0\] is -1"),
    ],
)
def test_debug_check_finds_ids_out_of_range(place: str, value: int, message: str) -> None:
    arguments = make_batch((20, 5)).arguments()
    arguments[place].view(-1)[0] = value
    with pytest.raises(ValueError, match=message):
        ops.paged_decode(**arguments, check_ids=True)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 3, 4], "query_starts must begin at 0"),
        ([0, 5, 4], "not fall"),
        ([0, 3, 9], r"end by the number of tokens \(4\)"),
    ],
)
def test_debug_check_finds_wrong_query_starts(starts: list[int], message: str) -> None:
    batch = make_batch((20, 5), (3, 1))
    with pytest.raises(ValueError, match=message):
        ops.ragged_prefill(**batch.arguments(), query_starts=torch.tensor(starts, dtype=torch.int32), check_ids=True)


def test_context_shorter_than_its_new_tokens_is_refused() -> None:
    batch = make_batch((20, 5), (3, 1))
    batch.context_lens[0] = 2
    with pytest.raises(ValueError, match=r"context_lens\[0\] is 2, fewer than its 3 new tokens"):
        ops.ragged_prefill(**batch.arguments(), query_starts=batch.query_starts, check_ids=True)


@pytest.mark.parametrize(("target", "found"), [("sm_80", "e4m3fn"), ("gfx942", "e4m3fn"), ("sm_90", "e4m3fnuz")])
def test_chip_without_the_format_is_refused(target: str, found: str) -> None:
    dtype = getattr(torch, f"float8_{found}")
    batch = make_batch((20,), cache_dtype=dtype, scaling="tensor")
    with pytest.raises(ValueError, match=f"{target} has no float8_{found}; it has float16, bfloat16, float32"):
        ops.paged_decode(**batch.arguments(), target=Target.named(target))


def test_write_refuses_slots_out_of_range_and_twice() -> None:
    cache = KVCache.allocate(2, block_size=16, num_kv_heads=1, key_dim=16, dtype=torch.float32)
    key = torch.zeros(2, 1, 16)
    for slots, message in (([0, 32], "found 32"), ([-2, 0], "found -2"), ([3, 3], "names a slot twice")):
        with pytest.raises(ValueError, match=message):
            ops.write_kv(key, key, cache, torch.tensor(slots, dtype=torch.int32), check_ids=True)


def test_caches_that_cannot_be_are_refused() -> None:
    shape = {"block_size": 16, "num_kv_heads": 1, "key_dim": 16}
    with pytest.raises(ValueError, match="at least one of each"):
        KVCache.allocate(0, **shape)
    with pytest.raises(ValueError, match="key_scale is for fp8 caches"):
        KVCache.allocate(2, **shape, scaling="tensor")
    with pytest.raises(ValueError, match="must share one dtype"):
        KVCache.allocate(2, **shape, dtype=torch.float64)


def test_ops_on_rows_refuse_what_does_not_fit() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \(8\), found \(4,\)"):
        ops.rms_norm(x, torch.zeros(4), 1e-6)
    with pytest.raises(ValueError, match="residual must be like x"):
        ops.rms_norm(x, torch.zeros(8), 1e-6, residual=x.half())
    with pytest.raises(ValueError, match=r"up must have shape \(2, 8\)"):
        ops.silu_mul(x, x[:1])
    with pytest.raises(ValueError, match="rotate 20 dimensions of a head, which has 16"):
        ops.rope(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16), torch.zeros(2, 10), torch.zeros(2, 10))
    with pytest.raises(ValueError, match="come together"):
        ops.rope(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16), torch.zeros(2, 8), torch.zeros(2, 8), value=x)
    blocks = torch.zeros((3, 24), dtype=torch.uint8)
    with pytest.raises(ValueError, match="a multiple of 16 bytes"):
        ops.move_blocks(blocks, blocks, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


def test_swapping_refuses_blocks_outside_a_tier() -> None:
    cache = KVCache.allocate(3, block_size=16, num_kv_heads=1, key_dim=16)
    tier = ops.HostTier([cache], 2)
    for moves, message in (([(0, 2)], "found host block 2 and block 0"), ([(0, 1), (1, 1)], "comes twice")):
        with pytest.raises(ValueError, match=message):
            tier.swap_out(moves)
    with pytest.raises(ValueError, match="found move 0 -> 3"):
        ops.copy_blocks([cache], [(0, 3)])
