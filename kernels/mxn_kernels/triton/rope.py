"""Rotary embedding: a program takes a tile of (token, head) rows, query heads and key heads alike.

A row is loaded twice, as it is and with each pair swapped, which costs a cache hit and leaves it in one piece for the
store.
"""

import torch
import triton
import triton.language as tl

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.target import Target
from mxn_kernels.triton.attend import cache_arguments, padded_dim
from mxn_kernels.triton.cache_rows import fp8_largest, row_scale, store_rows
from mxn_kernels.triton.launch import INTERPRET, launch

TILE_ELEMENTS = 4096

_NO_CACHE = {
    **dict.fromkeys(("keys_ptr", "values_ptr", "key_scale_ptr", "value_scale_ptr")),
    **dict.fromkeys(("stride_kb", "stride_kh", "stride_kt", "stride_vb", "stride_vh", "stride_vt"), 0),
    **dict.fromkeys(("stride_sb", "stride_sh", "stride_st", "SCALE_MODE"), 0),
    **dict.fromkeys(("BLOCK_SIZE", "DV", "BLOCK_DV"), 1),
}


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_interleaved: bool,
    value: torch.Tensor | None,
    cache: KVCache | None,
    slot_mapping: torch.Tensor | None,
    out: torch.Tensor,
    out_key: torch.Tensor | None,
    target: Target,
) -> None:
    num_tokens, num_heads, dim = query.shape
    num_kv_heads = key.shape[1]
    rows = max(1, TILE_ELEMENTS // padded_dim(dim))
    num_rows = num_tokens * (num_heads + num_kv_heads)
    arguments = {**(_NO_CACHE if cache is None else cache_arguments(cache)), "DK": dim, "BLOCK_DK": padded_dim(dim)}
    launch(
        _rope_kernel,
        (triton.cdiv(num_rows, rows),),
        options={"num_warps": 4},
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        cos_ptr=cos,
        sin_ptr=sin,
        out_ptr=out,
        out_key_ptr=out_key,
        slots_ptr=slot_mapping,
        num_rows=num_rows,
        stride_qt=query.stride(0),
        stride_qh=query.stride(1),
        stride_nt=key.stride(0),
        stride_nh=key.stride(1),
        stride_wt=0 if value is None else value.stride(0),
        stride_wh=0 if value is None else value.stride(1),
        stride_ct=cos.stride(0),
        stride_st_sin=sin.stride(0),
        **arguments,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=cos.shape[1],
        ROWS=rows,
        IS_INTERLEAVED=is_interleaved,
        HAS_CACHE=cache is not None,
        FP8_LARGEST=0.0 if cache is None else fp8_largest(cache.dtype),
        INTERPRET=INTERPRET,
    )


@triton.jit
def _rope_kernel(
    query_ptr,  # [T, heads, K]
    key_ptr,  # [T, KV heads, K]
    value_ptr,  # [T, KV heads, V]
    cos_ptr,  # [T, HALF]
    sin_ptr,
    out_ptr,  # contiguous
    out_key_ptr,  # contiguous
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    slots_ptr,
    num_rows,
    stride_qt,
    stride_qh,
    stride_nt,
    stride_nh,
    stride_wt,
    stride_wh,
    stride_ct,
    stride_st_sin,
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
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    FP8_LARGEST: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = (rows // (NUM_HEADS + NUM_KV_HEADS)).to(tl.int64)
    heads = (rows % (NUM_HEADS + NUM_KV_HEADS)).to(tl.int64)
    is_query = (heads < NUM_HEADS) & (rows < num_rows)
    is_key = (heads >= NUM_HEADS) & (rows < num_rows)
    kv_heads = heads - NUM_HEADS

    dims = tl.arange(0, BLOCK_DK)[None, :]
    in_row = dims < DK
    if IS_INTERLEAVED:
        pair = dims // 2
        other = dims ^ 1
        sign = tl.where(dims % 2 == 0, -1.0, 1.0)
    else:
        pair = tl.where(dims < HALF, dims, dims - HALF)
        other = tl.where(dims < HALF, dims + HALF, dims - HALF)
        sign = tl.where(dims < HALF, -1.0, 1.0)
    is_rotated = dims < 2 * HALF

    query_rows = query_ptr + (tokens * stride_qt + heads * stride_qh)[:, None]
    key_rows = key_ptr + (tokens * stride_nt + kv_heads * stride_nh)[:, None]
    x = tl.load(query_rows + dims, mask=is_query[:, None] & in_row, other=0.0).to(tl.float32)
    x += tl.load(key_rows + dims, mask=is_key[:, None] & in_row, other=0.0).to(tl.float32)
    swapped = tl.load(query_rows + other, mask=is_query[:, None] & is_rotated, other=0.0).to(tl.float32)
    swapped += tl.load(key_rows + other, mask=is_key[:, None] & is_rotated, other=0.0).to(tl.float32)
    angle_mask = (rows < num_rows)[:, None] & is_rotated
    cos = tl.load(cos_ptr + (tokens * stride_ct)[:, None] + pair, mask=angle_mask, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + (tokens * stride_st_sin)[:, None] + pair, mask=angle_mask, other=0.0).to(tl.float32)
    rotated = x * cos + swapped * sin * sign

    out_rows = out_ptr + ((tokens * NUM_HEADS + heads) * DK)[:, None]
    tl.store(out_rows + dims, rotated.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & in_row)
    if HAS_CACHE:
        slots = tl.load(slots_ptr + tokens, mask=is_key, other=-1)
        mask = slots >= 0
        blocks = (slots // BLOCK_SIZE).to(tl.int64)
        offsets = slots % BLOCK_SIZE
        scale_offsets = blocks * stride_sb + kv_heads * stride_sh + offsets * stride_st
        # As if it had been stored in the model's dtype and read again, so that this equals rope, then write_kv.
        rotated = rotated.to(key_ptr.dtype.element_ty).to(tl.float32)
        largest = tl.max(tl.where(in_row, tl.abs(rotated), 0.0), 1)
        factor = row_scale(largest, key_scale_ptr, scale_offsets, mask, SCALE_MODE, FP8_LARGEST)
        ptrs = keys_ptr + (blocks * stride_kb + kv_heads * stride_kh + offsets * stride_kt)[:, None] + dims
        store_rows(rotated, factor, ptrs, mask[:, None] & in_row, FP8_LARGEST, INTERPRET)

        value_dims = tl.arange(0, BLOCK_DV)[None, :]
        value_mask = mask[:, None] & (value_dims < DV)
        value_rows = value_ptr + (tokens * stride_wt + kv_heads * stride_wh)[:, None]
        value = tl.load(value_rows + value_dims, mask=value_mask, other=0.0).to(tl.float32)
        factor = row_scale(tl.max(tl.abs(value), 1), value_scale_ptr, scale_offsets, mask, SCALE_MODE, FP8_LARGEST)
        ptrs = values_ptr + (blocks * stride_vb + kv_heads * stride_vh + offsets * stride_vt)[:, None] + value_dims
        store_rows(value, factor, ptrs, value_mask, FP8_LARGEST, INTERPRET)
    else:
        key_out = out_key_ptr + ((tokens * NUM_KV_HEADS + kv_heads) * DK)[:, None]
        tl.store(key_out + dims, rotated.to(out_key_ptr.dtype.element_ty), mask=is_key[:, None] & in_row)
