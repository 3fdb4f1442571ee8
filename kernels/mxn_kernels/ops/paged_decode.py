"""Attention of one new token per sequence over its paged KV cache."""

from __future__ import annotations

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.attention_reference import attend
from mxn_kernels.ops.checks import check_attention, check_ids_in_range, check_out, need, target_of
from mxn_kernels.select import select
from mxn_kernels.target import Target


def paged_decode(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    max_context: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    check_ids: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one new token per sequence over its paged KV cache, which holds that token already.

    Args:
      query (S, num_heads, key_dim); head h reads KV head h // (num_heads // num_kv_heads).
      block_table (S, max_blocks) int32: entries past a sequence's end are not read.
      context_lens (S) int32: tokens in the cache, the new one included. 0 is a padded row: zeros come back, and -inf.
      window: tokens a query sees, itself included. softcap: scores become softcap * tanh(score / softcap).
      sinks (num_heads,): logits that take part in the softmax without a value.
      num_splits: programs per sequence and KV head. None chooses by the batch; a fixed number makes a sequence's result
        independent of the batch, bit for bit. max_context: an upper bound of context_lens for that choice, None for
        what
        the block table holds; it changes speed only.
      check_ids: reads the tables back and checks every block id, for debugging; waits for the chip.
      implementation: a registered name, None for the first that fits the chip (`mxn_kernels.select`).
    Returns: (S, num_heads, value_dim) in the query's dtype, sums kept in fp32; with return_lse also (S, num_heads)
    fp32, the
      natural logarithm of the softmax's denominator.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    check_attention(query, cache, block_table, context_lens, scaling, window, softcap, sinks)
    num_seqs = context_lens.shape[0]
    need(query.shape[0] == num_seqs, f"query must have one row per sequence ({num_seqs}), found {query.shape[0]}")
    need(num_splits is None or num_splits >= 1, f"num_splits must be None or at least 1, found {num_splits}")
    target = target_of(query, target, query.dtype, cache.dtype)
    if check_ids:
        check_ids_in_range(cache, block_table, context_lens)
    out = check_out(out, query, cache.value_dim)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if return_lse else None
    select("paged_decode", target, implementation)(
        query,
        cache,
        block_table,
        context_lens,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        num_splits=num_splits,
        max_context=block_table.shape[1] * cache.block_size if max_context is None else max_context,
        out=out,
        lse=lse,
        target=target,
    )
    return out if lse is None else (out, lse)


def paged_decode_reference(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    max_context: int | None = None,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    target: Target | None = None,
) -> None:
    """The same in torch, one sequence at a time, in float64; `out` and `lse` may be float64 too."""
    for seq, context in enumerate(context_lens.tolist()):
        keys, values = cache.gather(block_table[seq], context)
        position = torch.arange(context, device=query.device)
        visible = (position >= context - (window or context))[None]
        row, row_lse = attend(query[seq, None], keys, values, visible, scaling=scaling, softcap=softcap, sinks=sinks)
        out[seq] = row[0]
        if lse is not None:
            lse[seq] = row_lse[0]
