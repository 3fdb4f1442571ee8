"""Attention of one new token per sequence, where groups of sequences share leading blocks and read them once."""

from __future__ import annotations

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.checks import check_attention, check_ids_in_range, check_out, need, target_of
from mxn_kernels.ops.paged_decode import paged_decode_reference
from mxn_kernels.select import select
from mxn_kernels.shared_prefix import SharedPrefix
from mxn_kernels.target import Target


def shared_prefix_decode(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    prefix: SharedPrefix,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    max_tail: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    check_ids: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What `paged_decode` computes, up to the rounding of fp32 sums, with each group's shared blocks read once.

    Layers with a sliding window go to `paged_decode`: their queries see different parts of the prefix, or none.
    Args:
      prefix: from `plan_shared_prefix`, which is None where sharing does not pay. Every member's context covers its
      prefix.
      num_splits: fixed number of splits of prefix and tail each, None to choose by the batch. max_tail: an upper bound
      of the tokens
        after the prefix, for that choice.
      The rest, Returns and Raises as in `paged_decode`.
    """
    check_attention(query, cache, block_table, context_lens, scaling, None, softcap, sinks)
    num_seqs = context_lens.shape[0]
    need(query.shape[0] == num_seqs, f"query must have one row per sequence ({num_seqs}), found {query.shape[0]}")
    need(prefix.num_seqs == num_seqs, f"the prefix plan is for {prefix.num_seqs} sequences, found {num_seqs}")
    same = prefix.block_size == cache.block_size
    need(same, f"the prefix plan is for blocks of {prefix.block_size} tokens, the cache has {cache.block_size}")
    room = block_table.shape[1] * cache.block_size
    need(prefix.max_prefix <= room, f"the prefix plan has {prefix.max_prefix} tokens, the block table room for {room}")
    need(bool(prefix.groups), "the prefix plan has no groups; use paged_decode")
    need(num_splits is None or num_splits >= 1, f"num_splits must be None or at least 1, found {num_splits}")
    target = target_of(query, target, query.dtype, cache.dtype)
    if check_ids:
        check_ids_in_range(cache, block_table, context_lens)
        need(not prefix.is_room, "the ids of a plan whose groups change under a captured graph cannot be checked")
        _check_groups(prefix, block_table.tolist(), context_lens.tolist())
    out = check_out(out, query, cache.value_dim)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if return_lse else None
    select("shared_prefix_decode", target, implementation)(
        query,
        cache,
        block_table,
        context_lens,
        prefix,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        num_splits=num_splits,
        max_tail=room if max_tail is None else max_tail,
        out=out,
        lse=lse,
        target=target,
    )
    return out if lse is None else (out, lse)


def shared_prefix_decode_reference(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    prefix: SharedPrefix,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    max_tail: int | None = None,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    target: Target | None = None,
) -> None:
    """Plain decode in float64: sharing changes what is read, not what is computed."""
    options = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    paged_decode_reference(query, cache, block_table, context_lens, out=out, lse=lse, **options)


def _check_groups(prefix: SharedPrefix, table: list[list[int]], contexts: list[int]) -> None:
    for group in prefix.groups:
        first = table[group.members[0]][: group.num_blocks]
        for row in group.members:
            need(
                table[row][: group.num_blocks] == first, f"row {row} does not share its first {group.num_blocks} blocks"
            )
            covered = contexts[row] >= group.num_blocks * prefix.block_size
            need(covered, f"row {row} has {contexts[row]} tokens, fewer than the prefix of its group")
