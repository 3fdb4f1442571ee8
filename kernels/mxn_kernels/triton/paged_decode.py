"""Split-KV decode: one program takes all query heads of one KV head over one split of one sequence's tokens.

With one split it writes the result; with more, each writes a normalised fp32 result with its log-sum-exp, and a second
kernel adds them up in the order of the splits. Source: Flash-Decoding (Dao et al., 2023); GQA packing and the direct
write as in TensorRT-LLM's and vLLM's Triton kernels.
"""

import torch
import triton
import triton.language as tl

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.splits import decode_splits
from mxn_kernels.target import Target
from mxn_kernels.triton.attend import attend_range, cache_arguments, finish_rows, score_scale, start_rows
from mxn_kernels.triton.launch import INTERPRET, launch
from mxn_kernels.triton.merge import merge
from mxn_kernels.tuning import tile_for


def paged_decode(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    num_splits: int | None,
    max_context: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    target: Target,
) -> None:
    """Fills out (S, num_heads, value_dim) and, if given, lse (S, num_heads)."""
    num_seqs, num_heads, _ = query.shape
    tile = tile_for("paged_decode", target, query.dtype, cache, num_heads // cache.num_kv_heads)
    if num_splits is None:
        num_splits = decode_splits(
            num_seqs, cache.num_kv_heads, max_context, window, tile.block_n, target.num_multiprocessors
        )
    partial_out, partial_lse = out[None], None if lse is None else lse[None]
    if num_splits > 1:
        partial_out = torch.empty((num_splits, *out.shape), dtype=torch.float32, device=out.device)
        partial_lse = torch.empty((num_splits, num_seqs, num_heads), dtype=torch.float32, device=out.device)
    launch_splits(
        query,
        cache,
        block_table,
        context_lens,
        None,
        partial_out,
        partial_lse,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        target=target,
    )
    if num_splits > 1:
        merge(partial_out, partial_lse, out, lse)


def launch_splits(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    first_tokens: torch.Tensor | None,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor | None,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    target: Target,
) -> None:
    """One split per leading entry of partial_out (P, S, num_heads, value_dim) and partial_lse (P, S, num_heads).

    first_tokens (S,) int32: tokens before are left out, as another pass has taken them.
    """
    num_splits, num_seqs, num_heads, _ = partial_out.shape
    group = num_heads // cache.num_kv_heads
    tile = tile_for("paged_decode", target, query.dtype, cache, group)
    launch(
        _paged_decode_kernel,
        (num_splits, cache.num_kv_heads, num_seqs),
        options=tile.options(target),
        out_ptr=partial_out,
        lse_ptr=partial_lse,
        query_ptr=query,
        table_ptr=block_table,
        context_ptr=context_lens,
        first_ptr=first_tokens,
        sinks_ptr=sinks,
        scaling=scaling,
        softcap=softcap or 0.0,
        stride_op=partial_out.stride(0),
        stride_on=partial_out.stride(1),
        stride_oh=partial_out.stride(2),
        stride_lp=0 if partial_lse is None else partial_lse.stride(0),
        stride_ln=0 if partial_lse is None else partial_lse.stride(1),
        stride_qn=query.stride(0),
        stride_qh=query.stride(1),
        stride_table=block_table.stride(0),
        **cache_arguments(cache),
        GROUP=group,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        WINDOW=window or 0,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        HAS_FIRST=first_tokens is not None,
        HAS_LSE=partial_lse is not None,
        INTERPRET=INTERPRET,
    )


@triton.jit(
    do_not_specialize=["stride_lp", "stride_table"],
    do_not_specialize_on_alignment=["table_ptr", "context_ptr", "first_ptr"],
)  # these follow the batch
def _paged_decode_kernel(
    out_ptr,  # [P, S, heads, V]
    lse_ptr,  # [P, S, heads]
    query_ptr,  # [S, heads, K]
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_ptr,
    context_ptr,
    first_ptr,
    sinks_ptr,
    scaling,
    softcap,
    stride_op,
    stride_on,
    stride_oh,
    stride_lp,
    stride_ln,
    stride_qn,
    stride_qh,
    stride_table,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_sb,
    stride_sh,
    stride_st,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LSE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)  # so is what is computed from it: strides may be large
    seq = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < GROUP
    heads = kv_head * GROUP + rows
    if HAS_LSE:
        lse_ptr += split.to(tl.int64) * stride_lp + seq * stride_ln

    # This split's tokens: an equal share of what the sequence sees, in whole tiles. Tiles start where the range does,
    # so
    # only the last one is uneven and only it is masked.
    context = tl.load(context_ptr + seq)
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + seq)
    if WINDOW > 0:
        first = tl.maximum(first, context - WINDOW)
    share = tl.cdiv(tl.cdiv(context - first, tl.num_programs(0)), BLOCK_N) * BLOCK_N
    start = first + split * share
    end = tl.minimum(context, start + share)
    if (start >= end) & (split > 0):
        if HAS_LSE:
            tl.store(lse_ptr + heads, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row_mask)
        return

    dims = tl.arange(0, BLOCK_DK)
    query_ptrs = query_ptr + seq * stride_qn + heads[:, None] * stride_qh + dims[None, :]
    query = tl.load(query_ptrs, mask=row_mask[:, None] & (dims[None, :] < DK), other=0.0)
    if INTERPRET:
        query = query.to(tl.float32)
    scale = score_scale(scaling, key_scale_ptr, SCALE_MODE, HAS_SOFTCAP)
    table_ptr += seq * stride_table
    keys_ptr += kv_head * stride_kh
    values_ptr += kv_head * stride_vh
    if SCALE_MODE == 2:
        key_scale_ptr += kv_head * stride_sh
        value_scale_ptr += kv_head * stride_sh

    maximum, total = start_rows(sinks_ptr, heads, row_mask, split, BLOCK_M, HAS_SINKS)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc, maximum, total = attend_range(
        query, acc, maximum, total, start, end, rows,
        table_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, scale, softcap,
        stride_kb, stride_kt, stride_vb, stride_vt, stride_sb, stride_st,
        BLOCK_N, BLOCK_SIZE, DK, DV, BLOCK_DK, BLOCK_DV, SCALE_MODE, HAS_SOFTCAP, INTERPRET,
    )  # fmt: skip

    out, lse = finish_rows(acc, maximum, total, value_scale_ptr, SCALE_MODE)
    value_dims = tl.arange(0, BLOCK_DV)
    out_ptrs = out_ptr + split.to(tl.int64) * stride_op + seq * stride_on
    out_ptrs += heads[:, None] * stride_oh + value_dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (value_dims[None, :] < DV))
    if HAS_LSE:
        tl.store(lse_ptr + heads, lse, mask=row_mask)
