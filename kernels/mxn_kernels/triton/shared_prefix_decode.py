"""Decode for sequences that share leading blocks: one pass of all their queries over the prefix, then their own tails.

The pass is shaped like prefill, without a causal mask: a tile of query rows (members of a group times the heads of one
KV
head) reads the prefix once. Both write fp32 partial results into one buffer, prefix splits first, and one merge adds
them up in that
order. Source: cascade inference (Ye et al., FlashInfer, 2024); Hydragen (Juravsky et al., 2024).
"""

import torch
import triton
import triton.language as tl

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.shared_prefix import SharedPrefix
from mxn_kernels.splits import decode_splits, prefix_splits
from mxn_kernels.target import Target
from mxn_kernels.triton.attend import attend_range, cache_arguments, find_block, finish_rows, score_scale, start_rows
from mxn_kernels.triton.launch import INTERPRET, launch
from mxn_kernels.triton.merge import merge
from mxn_kernels.triton.paged_decode import launch_splits
from mxn_kernels.tuning import tile_for


def shared_prefix_decode(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    prefix: SharedPrefix,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    num_splits: int | None,
    max_tail: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    target: Target,
) -> None:
    """Fills out (S, num_heads, value_dim) and, if given, lse (S, num_heads)."""
    num_seqs, num_heads, _ = query.shape
    group = num_heads // cache.num_kv_heads
    tile = tile_for("shared_prefix_decode", target, query.dtype, cache, group)
    tail_tile = tile_for("paged_decode", target, query.dtype, cache, group)
    block_q = tile.block_m // group
    num_tiles = sum(-(-len(members.members) // block_q) for members in prefix.groups)
    head_parts = num_splits or prefix_splits(
        num_tiles, cache.num_kv_heads, prefix.max_prefix, tile.block_n, target.num_multiprocessors
    )
    tail_parts = num_splits or decode_splits(
        num_seqs, cache.num_kv_heads, max_tail, None, tail_tile.block_n, target.num_multiprocessors
    )
    num_parts = head_parts + tail_parts
    partial_out = torch.empty((num_parts, *out.shape), dtype=torch.float32, device=out.device)
    partial_lse = torch.empty((num_parts, num_seqs, num_heads), dtype=torch.float32, device=out.device)
    if not prefix.covers_all:
        partial_lse[:head_parts].fill_(float("-inf"))
    same = {"scaling": scaling, "softcap": softcap}
    _launch_prefix(query, cache, block_table, prefix, partial_out, partial_lse, head_parts, target, **same)
    launch_splits(
        query,
        cache,
        block_table,
        context_lens,
        prefix.first_tokens,
        partial_out[head_parts:],
        partial_lse[head_parts:],
        window=None,
        sinks=sinks,
        target=target,
        **same,
    )
    merge(partial_out, partial_lse, out, lse)


def _launch_prefix(query, cache, block_table, prefix, partial_out, partial_lse, num_parts, target, *, scaling, softcap):
    num_heads = query.shape[1]
    group = num_heads // cache.num_kv_heads
    tile = tile_for("shared_prefix_decode", target, query.dtype, cache, group)
    block_q = tile.block_m // group
    launch(
        _prefix_kernel,
        (prefix.num_members // block_q + len(prefix.groups), cache.num_kv_heads, num_parts),
        options=tile.options(target),
        out_ptr=partial_out,
        lse_ptr=partial_lse,
        query_ptr=query,
        table_ptr=block_table,
        members_ptr=prefix.members,
        starts_ptr=prefix.group_starts,
        prefix_ptr=prefix.prefix_tokens,
        num_groups=len(prefix.groups),
        scaling=scaling,
        softcap=softcap or 0.0,
        stride_op=partial_out.stride(0),
        stride_on=partial_out.stride(1),
        stride_oh=partial_out.stride(2),
        stride_lp=partial_lse.stride(0),
        stride_ln=partial_lse.stride(1),
        stride_qn=query.stride(0),
        stride_qh=query.stride(1),
        stride_table=block_table.stride(0),
        **cache_arguments(cache),
        GROUP=group,
        BLOCK_Q=block_q,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_SOFTCAP=softcap is not None,
        INTERPRET=INTERPRET,
    )


@triton.jit(
    do_not_specialize=["num_groups", "stride_lp", "stride_table"],
    do_not_specialize_on_alignment=["table_ptr", "members_ptr", "starts_ptr", "prefix_ptr"],
)  # these follow the batch
def _prefix_kernel(
    out_ptr,  # [P, S, heads, V] fp32
    lse_ptr,  # [P, S, heads] fp32
    query_ptr,  # [S, heads, K]
    keys_ptr,
    values_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_ptr,
    members_ptr,
    starts_ptr,
    prefix_ptr,
    num_groups,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)  # so is what is computed from it: strides may be large
    part = tl.program_id(2)
    group, first_member, num_members, block_start = find_block(starts_ptr, num_groups, tl.program_id(0), BLOCK_Q)
    if block_start >= num_members:
        return

    rows = tl.arange(0, BLOCK_M)
    in_block = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_mask = (in_block < BLOCK_Q) & (block_start + in_block < num_members)
    seqs = tl.load(members_ptr + first_member + block_start + in_block, mask=row_mask, other=0).to(tl.int64)

    dims = tl.arange(0, BLOCK_DK)
    query_ptrs = query_ptr + (seqs * stride_qn + heads * stride_qh)[:, None] + dims[None, :]
    query = tl.load(query_ptrs, mask=row_mask[:, None] & (dims[None, :] < DK), other=0.0)
    if INTERPRET:
        query = query.to(tl.float32)
    scale = score_scale(scaling, key_scale_ptr, SCALE_MODE, HAS_SOFTCAP)
    table_ptr += tl.load(members_ptr + first_member).to(tl.int64) * stride_table
    keys_ptr += kv_head * stride_kh
    values_ptr += kv_head * stride_vh
    if SCALE_MODE == 2:
        key_scale_ptr += kv_head * stride_sh
        value_scale_ptr += kv_head * stride_sh

    num_tokens = tl.load(prefix_ptr + group)
    share = tl.cdiv(tl.cdiv(num_tokens, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    start = part * share
    end = tl.minimum(num_tokens, start + share)
    maximum, total = start_rows(None, heads, row_mask, part, BLOCK_M, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc, maximum, total = attend_range(
        query, acc, maximum, total, start, end, rows,
        table_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, scale, softcap,
        stride_kb, stride_kt, stride_vb, stride_vt, stride_sb, stride_st,
        BLOCK_N, BLOCK_SIZE, DK, DV, BLOCK_DK, BLOCK_DV, SCALE_MODE, HAS_SOFTCAP, INTERPRET,
    )  # fmt: skip

    out, lse = finish_rows(acc, maximum, total, value_scale_ptr, SCALE_MODE)
    value_dims = tl.arange(0, BLOCK_DV)
    part = part.to(tl.int64)
    out_ptrs = out_ptr + part * stride_op + (seqs * stride_on + heads * stride_oh)[:, None] + value_dims[None, :]
    tl.store(out_ptrs, out, mask=row_mask[:, None] & (value_dims[None, :] < DV))
    tl.store(lse_ptr + part * stride_lp + seqs * stride_ln + heads, lse, mask=row_mask)
