"""Cache writes, block moves, norms, rotations and gates against their references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

import triton
from mxn_kernels import ops
from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.copy_blocks import copy_blocks_reference, independent_moves
from mxn_kernels.testing.batches import guard_is_intact, guarded_cache
from mxn_kernels.testing.tolerances import POINTWISE, error
from mxn_kernels.triton.launch import record_launches

E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
CACHES = [
    (torch.float32, torch.float32, "none"),
    (torch.float16, torch.float16, "none"),
    (torch.bfloat16, torch.bfloat16, "none"),
    (torch.float16, E4M3, "none"),
    (torch.bfloat16, E4M3, "tensor"),
    (torch.float32, E4M3, "token_head"),
    pytest.param(
        torch.float16,
        FNUZ,
        "tensor",
        marks=pytest.mark.skipif(
            triton.__version__.startswith("3.6"), reason="Triton 3.6's interpreter lacks float8_e4m3fnuz"
        ),
    ),
]
SLOTS = [3, -1, 17, 40, -1, 0, 63]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def tensors_are_on_the_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize(("dtype", "cache_dtype", "scaling"), CACHES, ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 48)])
def test_write_puts_rows_at_their_slots_and_nowhere_else(dtype, cache_dtype, scaling, key_dim, value_dim) -> None:
    key, value = rows(dtype, key_dim), rows(dtype, value_dim)
    written = []
    for implementation in ("triton", "reference"):
        cache = make_cache(cache_dtype, scaling, key_dim, value_dim)
        slots = torch.tensor(SLOTS, dtype=torch.int32)
        ops.write_kv(key, value, cache, slots, check_ids=True, implementation=implementation)
        written.append(cache)
    assert guard_is_intact(written[0])
    assert same_bytes(*written)


def test_write_takes_rows_with_heads_outside_tokens() -> None:
    """The layout in which models hand them over: (heads, tokens, dim)."""
    key = rows(torch.float32, 64)
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    plain, strided = make_cache(torch.float32, "none", 64, 64), make_cache(torch.float32, "none", 64, 64)
    ops.write_kv(key, key, plain, slots)
    turned = key.transpose(0, 1).contiguous().transpose(0, 1)
    ops.write_kv(turned, turned, strided, slots)
    assert same_bytes(plain, strided)


def test_writing_nothing_writes_nothing() -> None:
    cache = make_cache(torch.float32, "none", 64, 64)
    before = cache.blocks.clone()
    ops.write_kv(rows(torch.float32, 64), rows(torch.float32, 64), cache, torch.full((7,), -1, dtype=torch.int32))
    nothing = torch.empty(0, 2, 64)
    ops.write_kv(nothing, nothing, cache, torch.empty(0, dtype=torch.int32))
    assert torch.equal(cache.blocks, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 32)])
def test_rope_equals_reference(dtype, is_interleaved, dim, rotary_dim) -> None:
    query, key = rows(dtype, dim, heads=6), rows(dtype, dim)
    angles = torch.randn(7, rotary_dim // 2)
    both = [
        ops.rope(query, key, angles.cos(), angles.sin(), is_interleaved=is_interleaved, implementation=name)
        for name in ("triton", "reference")
    ]
    for found, wanted in zip(*both, strict=True):
        assert error(found, wanted) <= POINTWISE[dtype]


@pytest.mark.parametrize(("dtype", "cache_dtype", "scaling"), CACHES, ids=str)
def test_rope_into_cache_equals_rope_then_write(dtype, cache_dtype, scaling) -> None:
    query, key, value = rows(dtype, 64, heads=6), rows(dtype, 64), rows(dtype, 48)
    angles = torch.randn(7, 32)
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    fused, apart = (make_cache(cache_dtype, scaling, 64, 48) for _ in range(2))
    with record_launches() as launches:
        rotated = ops.rope(query, key, angles.cos(), angles.sin(), value=value, cache=fused, slot_mapping=slots)
    assert [launch.name for launch in launches] == ["rope_kernel"]
    wanted, wanted_key = ops.rope(query, key, angles.cos(), angles.sin())
    ops.write_kv(wanted_key, value, apart, slots)
    assert torch.equal(rotated, wanted)
    assert same_bytes(fused, apart)
    assert guard_is_intact(fused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 80, 128, 3000])
def test_rms_norm_equals_reference(dtype, width) -> None:
    x, weight = rows(dtype, width), torch.randn(width).to(dtype)
    for extra in ({}, {"offset": 1.0}, {"residual": rows(dtype, width)}):
        found = ops.rms_norm(x, weight, 1e-6, **extra)
        wanted = ops.rms_norm(x, weight, 1e-6, **extra, implementation="reference")
        pairs = zip(found, wanted, strict=True) if "residual" in extra else [(found, wanted)]
        assert all(error(a, b) <= POINTWISE[dtype] for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 100, 2049])
def test_silu_mul_takes_halves_of_one_projection(dtype, width) -> None:
    both = torch.randn(5, 2 * width).to(dtype)
    found, wanted = (ops.silu_mul(both[:, :width], both[:, width:], implementation=n) for n in ("triton", "reference"))
    assert error(found, wanted) <= POINTWISE[dtype]


def test_copies_happen_in_order() -> None:
    caches = [make_cache(torch.float16, "none", 64, 48) for _ in range(4)]
    for cache in caches:
        cache.blocks.copy_(torch.arange(5)[:, None].expand(-1, cache.blocks.shape[1]))
    moves = [(0, 1), (1, 2), (3, 0), (2, 2), (4, 3)]
    ops.copy_blocks(caches[:2], moves)
    copy_blocks_reference(caches[2:], moves)
    assert caches[0].blocks[:, 0].tolist() == [3, 0, 0, 4, 4]
    assert all(torch.equal(a.blocks, b.blocks) for a, b in zip(caches[:2], caches[2:], strict=True))


def test_moves_that_touch_each_other_are_parted() -> None:
    assert list(independent_moves([(0, 1), (0, 2), (3, 4)])) == [[(0, 1), (0, 2), (3, 4)]]
    assert list(independent_moves([(0, 1), (1, 2), (5, 0)])) == [[(0, 1)], [(1, 2), (5, 0)]]
    assert list(independent_moves([(0, 1), (2, 1), (3, 3)])) == [[(0, 1)], [(2, 1)]]
    assert list(independent_moves([])) == []


@pytest.mark.parametrize("max_moves", [1, 2, 8])
def test_blocks_come_back_from_the_host_as_they_left(max_moves: int) -> None:
    caches = [make_cache(torch.float16, "none", 64, 48), make_cache(E4M3, "token_head", 64, 64)]
    for cache in caches:
        cache.blocks.random_(256)
    tier = ops.HostTier(caches, 6, max_moves=max_moves)
    before = [cache.blocks.clone() for cache in caches]
    tier.swap_out([(0, 5), (2, 0), (3, 4)]).wait()
    for cache in caches:
        cache.blocks.zero_()
    transfer = tier.swap_in([(5, 1), (0, 2), (4, 0)])
    transfer.hold_back()
    assert transfer.is_done()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.blocks[[1, 2, 0]], old[[0, 2, 3]])
        assert not cache.blocks[3:].any()


def rows(dtype: torch.dtype, width: int, heads: int = 2) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(width + heads)
    drawn = torch.randn((7, heads, width), generator=generator, device="cpu") * 3
    return drawn.to(torch.get_default_device(), dtype)


def make_cache(dtype: torch.dtype, scaling: str, key_dim: int, value_dim: int) -> KVCache:
    shape = {"block_size": 16, "num_kv_heads": 2, "key_dim": key_dim, "value_dim": value_dim}
    cache = guarded_cache(5, **shape, dtype=dtype, scaling=scaling, device=torch.get_default_device())
    if scaling == "tensor":
        cache.key_scale.fill_(0.02)
        cache.value_scale.fill_(0.3)
    return cache


def same_bytes(found: KVCache, wanted: KVCache) -> bool:
    """Equal down to the bytes that were not written."""
    return torch.equal(found.blocks, wanted.blocks)
