"""Writes new keys and values at their slots: a program takes a tile of (token, head) rows, keys then values."""

import torch
import triton
import triton.language as tl

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.target import Target
from mxn_kernels.triton.attend import cache_arguments
from mxn_kernels.triton.cache_rows import fp8_largest, row_scale, store_rows
from mxn_kernels.triton.launch import INTERPRET, launch

TILE_ELEMENTS = 4096  # of keys or values per program: 8 KiB in half precision, 16 bytes for each thread twice


def write_kv(
    key: torch.Tensor, value: torch.Tensor, cache: KVCache, slot_mapping: torch.Tensor, *, target: Target
) -> None:
    arguments = cache_arguments(cache)
    rows = max(1, TILE_ELEMENTS // max(arguments["BLOCK_DK"], arguments["BLOCK_DV"]))
    num_rows = key.shape[0] * cache.num_kv_heads
    launch(
        _write_kv_kernel,
        (triton.cdiv(num_rows, rows),),
        options={"num_warps": 4},
        key_ptr=key,
        value_ptr=value,
        slots_ptr=slot_mapping,
        num_rows=num_rows,
        stride_nt=key.stride(0),
        stride_nh=key.stride(1),
        stride_wt=value.stride(0),
        stride_wh=value.stride(1),
        **arguments,
        NUM_HEADS=cache.num_kv_heads,
        ROWS=rows,
        FP8_LARGEST=fp8_largest(cache.dtype),
        INTERPRET=INTERPRET,
    )


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots_ptr"])  # these follow the batch
def _write_kv_kernel(
    key_ptr,  # [T, heads, K]
    value_ptr,  # [T, heads, V]
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    slots_ptr,
    num_rows,
    stride_nt,
    stride_nh,
    stride_wt,
    stride_wh,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_sb,
    stride_sh,
    stride_st,
    NUM_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    FP8_LARGEST: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = (rows // NUM_HEADS).to(tl.int64)
    heads = (rows % NUM_HEADS).to(tl.int64)
    slots = tl.load(slots_ptr + tokens, mask=rows < num_rows, other=-1)
    mask = slots >= 0
    blocks = (slots // BLOCK_SIZE).to(tl.int64)
    offsets = slots % BLOCK_SIZE
    scale_offsets = blocks * stride_sb + heads * stride_sh + offsets * stride_st

    dims = tl.arange(0, BLOCK_DK)
    tile_mask = mask[:, None] & (dims[None, :] < DK)
    new = tl.load(
        key_ptr + (tokens * stride_nt + heads * stride_nh)[:, None] + dims[None, :], mask=tile_mask, other=0.0
    )
    if INTERPRET:
        new = new.to(tl.float32)
    factor = row_scale(
        tl.max(tl.abs(new.to(tl.float32)), 1), key_scale_ptr, scale_offsets, mask, SCALE_MODE, FP8_LARGEST
    )
    ptrs = keys_ptr + (blocks * stride_kb + heads * stride_kh + offsets * stride_kt)[:, None] + dims[None, :]
    store_rows(new, factor, ptrs, tile_mask, FP8_LARGEST, INTERPRET)

    dims = tl.arange(0, BLOCK_DV)
    tile_mask = mask[:, None] & (dims[None, :] < DV)
    new = tl.load(
        value_ptr + (tokens * stride_wt + heads * stride_wh)[:, None] + dims[None, :], mask=tile_mask, other=0.0
    )
    if INTERPRET:
        new = new.to(tl.float32)
    factor = row_scale(
        tl.max(tl.abs(new.to(tl.float32)), 1), value_scale_ptr, scale_offsets, mask, SCALE_MODE, FP8_LARGEST
    )
    ptrs = values_ptr + (blocks * stride_vb + heads * stride_vh + offsets * stride_vt)[:, None] + dims[None, :]
    store_rows(new, factor, ptrs, tile_mask, FP8_LARGEST, INTERPRET)
