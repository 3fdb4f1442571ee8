"""Causal attention of chunks of many sequences, each continuing from its cached tokens."""

from __future__ import annotations

from itertools import pairwise

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.attention_reference import attend
from mxn_kernels.ops.checks import check_attention, check_ids_in_range, check_index, check_out, need, target_of
from mxn_kernels.select import select
from mxn_kernels.target import Target


def ragged_prefill(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    check_ids: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of chunks of many sequences, whose keys and values the cache holds already.

    Args:
      query (T, num_heads, key_dim): the sequences' new tokens one after another.
      query_starts (S + 1) int32: where each sequence's tokens begin; the last entry ends them, and rows from there on
        (padding) are left as they are. A sequence's tokens are the last ones of its context.
      context_lens (S) int32: tokens in the cache, new ones included, so at least as many as new ones.
      The rest as in `paged_decode`.
    Returns: (T, num_heads, value_dim) in the query's dtype; with return_lse also (T, num_heads) fp32. A token's result
    depends on
      its own sequence alone, and on where its chunk begins only by rounding.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    check_attention(query, cache, block_table, context_lens, scaling, window, softcap, sinks)
    check_index("query_starts", query_starts, (context_lens.shape[0] + 1,), query.device)
    target = target_of(query, target, query.dtype, cache.dtype)
    if check_ids:
        check_ids_in_range(cache, block_table, context_lens)
        _check_starts(query_starts.tolist(), context_lens.tolist(), query.shape[0])
    out = check_out(out, query, cache.value_dim)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if return_lse else None
    select("ragged_prefill", target, implementation)(
        query,
        cache,
        block_table,
        query_starts,
        context_lens,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        out=out,
        lse=lse,
        target=target,
    )
    return out if lse is None else (out, lse)


def ragged_prefill_reference(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    target: Target | None = None,
) -> None:
    """The same in torch, one sequence at a time, in float64; `out` and `lse` may be float64 too."""
    starts = query_starts.tolist()
    for seq, context in enumerate(context_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        keys, values = cache.gather(block_table[seq], context)
        position = torch.arange(context, device=query.device)
        own = position[context - (rows.stop - rows.start) :, None]
        visible = position <= own
        if window is not None:
            visible &= position > own - window
        part, part_lse = attend(query[rows], keys, values, visible, scaling=scaling, softcap=softcap, sinks=sinks)
        out[rows] = part
        if lse is not None:
            lse[rows] = part_lse


def _check_starts(starts: list[int], contexts: list[int], num_tokens: int) -> None:
    ordered = starts[0] == 0 and all(a <= b for a, b in pairwise(starts)) and starts[-1] <= num_tokens
    need(
        ordered,
        f"query_starts must begin at 0, not fall, and end by the number of tokens ({num_tokens}), found {starts}",
    )
    for seq, context in enumerate(contexts):
        queries = starts[seq + 1] - starts[seq]
        need(context >= queries, f"context_lens[{seq}] is {context}, fewer than its {queries} new tokens")
