"""Causal attention for chunks of many sequences in one launch, each continuing from what its cache holds already.

A program takes BLOCK_Q tokens of one sequence times the query heads of one KV head, so keys and values are read once
for
the group. Tokens that every row sees go through an unmasked loop; the diagonal, and a window's far edge, through masked
ones. Source: FlashAttention-2 (Dao, 2023); packing tokens with heads and searching the sequence as in vLLM's unified
kernel.
"""

import torch
import triton
import triton.language as tl

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.target import Target
from mxn_kernels.triton.attend import attend_tile, cache_arguments, find_block, finish_rows, score_scale, start_rows
from mxn_kernels.triton.launch import INTERPRET, launch
from mxn_kernels.tuning import tile_for


def ragged_prefill(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    target: Target,
) -> None:
    """Fills out (T, num_heads, value_dim) and, if given, lse (T, num_heads)."""
    num_tokens, num_heads, _ = query.shape
    num_seqs = context_lens.shape[0]
    group = num_heads // cache.num_kv_heads
    tile = tile_for("ragged_prefill", target, query.dtype, cache, group)
    block_q = tile.block_m // group
    launch(
        _ragged_prefill_kernel,
        (num_query_blocks(num_tokens, num_seqs, block_q), cache.num_kv_heads),
        options=tile.options(target),
        out_ptr=out,
        lse_ptr=lse,
        query_ptr=query,
        table_ptr=block_table,
        starts_ptr=query_starts,
        context_ptr=context_lens,
        sinks_ptr=sinks,
        num_seqs=num_seqs,
        scaling=scaling,
        softcap=softcap or 0.0,
        stride_ot=out.stride(0),
        stride_oh=out.stride(1),
        stride_lt=0 if lse is None else lse.stride(0),
        stride_qt=query.stride(0),
        stride_qh=query.stride(1),
        stride_table=block_table.stride(0),
        **cache_arguments(cache),
        GROUP=group,
        BLOCK_Q=block_q,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        WINDOW=window or 0,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None,
        INTERPRET=INTERPRET,
    )


def num_query_blocks(num_tokens: int, num_seqs: int, block_q: int) -> int:
    """Enough for any division of the tokens over the sequences: each may end in one uneven block."""
    return num_tokens // block_q + num_seqs if num_tokens else 0


@triton.jit(
    do_not_specialize=["num_seqs", "stride_table"],
    do_not_specialize_on_alignment=["table_ptr", "starts_ptr", "context_ptr"],
)  # these follow the batch
def _ragged_prefill_kernel(
    out_ptr,  # [T, heads, V]
    lse_ptr,  # [T, heads]
    query_ptr,  # [T, heads, K]
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_ptr,
    starts_ptr,
    context_ptr,
    sinks_ptr,
    num_seqs,
    scaling,
    softcap,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_qt,
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
    BLOCK_Q: tl.constexpr,
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
    HAS_LSE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # The last blocks of a sequence see the most tokens; they start first, so that the short ones fill the gaps at the
    # end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)  # so is what is computed from it: strides may be large
    seq, first_query, num_queries, block_start = find_block(starts_ptr, num_seqs, block, BLOCK_Q)
    if block_start >= num_queries:
        return

    rows = tl.arange(0, BLOCK_M)
    in_block = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_mask = (in_block < BLOCK_Q) & (block_start + in_block < num_queries)
    context = tl.load(context_ptr + seq)
    first_position = context - num_queries + block_start
    last_position = tl.minimum(first_position + BLOCK_Q, context) - 1
    positions = first_position + in_block

    tokens = (first_query + block_start + in_block).to(tl.int64)
    dims = tl.arange(0, BLOCK_DK)
    query_ptrs = query_ptr + (tokens * stride_qt + heads * stride_qh)[:, None] + dims[None, :]
    query = tl.load(query_ptrs, mask=row_mask[:, None] & (dims[None, :] < DK), other=0.0)
    if INTERPRET:
        query = query.to(tl.float32)
    scale = score_scale(scaling, key_scale_ptr, SCALE_MODE, HAS_SOFTCAP)
    table_ptr += seq.to(tl.int64) * stride_table
    keys_ptr += kv_head * stride_kh
    values_ptr += kv_head * stride_vh
    if SCALE_MODE == 2:
        key_scale_ptr += kv_head * stride_sh
        value_scale_ptr += kv_head * stride_sh

    maximum, total = start_rows(sinks_ptr, heads, row_mask, 0, BLOCK_M, HAS_SINKS)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    columns = tl.arange(0, BLOCK_N)

    # begin .. inner_begin: the window's edge | .. inner_end: seen by all rows | .. end: the diagonal
    end = last_position + 1
    begin = 0
    inner_begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0)
        all_see = tl.maximum(last_position - WINDOW + 1, 0)
        inner_begin = tl.minimum(begin + tl.cdiv(all_see - begin, BLOCK_N) * BLOCK_N, end)
    inner_end = inner_begin + tl.maximum(first_position + 1 - inner_begin, 0) // BLOCK_N * BLOCK_N

    if WINDOW > 0:
        for token in tl.range(begin, inner_begin, BLOCK_N):
            acc, maximum, total = attend_tile(
                query, acc, maximum, total, token + columns, positions, inner_begin,
                table_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, scale, softcap,
                stride_kb, stride_kt, stride_vb, stride_vt, stride_sb, stride_st,
                BLOCK_SIZE, DK, DV, BLOCK_DK, BLOCK_DV, SCALE_MODE, HAS_SOFTCAP, WINDOW, True, True, INTERPRET,
            )  # fmt: skip
    for token in tl.range(inner_begin, inner_end, BLOCK_N):
        acc, maximum, total = attend_tile(
            query, acc, maximum, total, token + columns, positions, end,
            table_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt, stride_sb, stride_st,
            BLOCK_SIZE, DK, DV, BLOCK_DK, BLOCK_DV, SCALE_MODE, HAS_SOFTCAP, 0, False, False, INTERPRET,
        )  # fmt: skip
    for token in tl.range(inner_end, end, BLOCK_N):
        acc, maximum, total = attend_tile(
            query, acc, maximum, total, token + columns, positions, end,
            table_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt, stride_sb, stride_st,
            BLOCK_SIZE, DK, DV, BLOCK_DK, BLOCK_DV, SCALE_MODE, HAS_SOFTCAP, WINDOW, True, True, INTERPRET,
        )  # fmt: skip

    out, lse = finish_rows(acc, maximum, total, value_scale_ptr, SCALE_MODE)
    value_dims = tl.arange(0, BLOCK_DV)
    out_ptrs = out_ptr + (tokens * stride_ot + heads * stride_oh)[:, None] + value_dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (value_dims[None, :] < DV))
    if HAS_LSE:
        tl.store(lse_ptr + tokens * stride_lt + heads, lse, mask=row_mask)
