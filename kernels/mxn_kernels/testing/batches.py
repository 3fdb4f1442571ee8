"""Batches for the ops: caches surrounded by NaN, shuffled block tables, and the sizes that find faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mxn_kernels.kv_cache import KVCache, Scaling
from mxn_kernels.target import FP8_DTYPES

PAD_ID = 2**30  # past a sequence's last block: a kernel that follows it leaves the cache


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """A decode or prefill batch whose cache holds its sequences' keys and values and NaN everywhere else."""

    query: torch.Tensor
    cache: KVCache
    block_table: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    scaling: float

    def arguments(self) -> dict[str, Any]:
        """What `paged_decode` takes; `ragged_prefill` takes query_starts too."""
        return {
            "query": self.query,
            "cache": self.cache,
            "block_table": self.block_table,
            "context_lens": self.context_lens,
            "scaling": self.scaling,
        }


def make_batch(
    contexts: Sequence[int],
    queries: Sequence[int] | None = None,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 1,
    key_dim: int = 64,
    value_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    scaling: Scaling = "none",
    shared_blocks: Sequence[Sequence[int]] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Batch:
    """Args: contexts, queries: tokens per sequence in the cache and among them new ones (1 each by default).

    shared_blocks: groups as (number of blocks, row, row...) that get the same first blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    queries = [min(1, c) for c in contexts] if queries is None else list(queries)
    needed = [-(-context // block_size) for context in contexts]
    table = torch.full((len(contexts), max([1, *needed])), PAD_ID, dtype=torch.int32)
    free = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    num_blocks = len(free)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    for count, first, *others in shared_blocks:
        for row in others:
            table[row, :count] = table[first, :count]

    cache = guarded_cache(
        num_blocks,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        block_size=block_size,
        dtype=cache_dtype or dtype,
        scaling=scaling,
    )
    for row, context in enumerate(contexts):
        for index in range(needed[row]):
            held = min(block_size, context - index * block_size)
            _fill(cache, int(table[row, index]), held, generator)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.randn((int(starts[-1]), num_heads, key_dim), generator=generator).to(dtype)
    contexts_tensor = torch.tensor(list(contexts), dtype=torch.int32)
    batch = Batch(
        query=query,
        cache=cache,
        block_table=table,
        query_starts=starts,
        context_lens=contexts_tensor,
        scaling=key_dim**-0.5,
    )
    return batch if torch.device(device).type == "cpu" else to_device(batch, device)


def guarded_cache(num_blocks: int, **shape: Any) -> KVCache:
    """A cache that starts as NaN all over, inside a larger array of NaN: what is read without being written shows."""
    cache = KVCache.allocate(num_blocks + 2, **shape)
    cache.blocks.fill_(255)  # NaN in every float format, e4m3fnuz aside, where it is -7.5
    per_token = cache.scaling == "token_head"
    scales = (cache.key_scale[1:-1], cache.value_scale[1:-1]) if per_token else (cache.key_scale, cache.value_scale)
    return KVCache(cache.keys[1:-1], cache.values[1:-1], *scales, cache.blocks[1:-1])


def guard_is_intact(cache: KVCache) -> bool:
    """Whether the blocks before and after a `guarded_cache` are untouched."""
    storage = torch.empty(0, dtype=torch.uint8, device=cache.blocks.device).set_(cache.blocks.untyped_storage())
    width = cache.blocks.shape[1]
    return bool((storage[:width] == 255).all() and (storage[-width:] == 255).all())


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Copies a batch, guard included."""
    old = batch.cache
    storage = torch.empty(0, dtype=torch.uint8).set_(old.blocks.untyped_storage()).to(device)

    def moved(view: torch.Tensor | None) -> torch.Tensor | None:
        if view is None or view.untyped_storage().data_ptr() != old.blocks.untyped_storage().data_ptr():
            return None if view is None else view.to(device)
        typed = storage.view(view.dtype)
        return typed.as_strided(view.shape, view.stride(), view.storage_offset())

    cache = KVCache(*(moved(t) for t in (old.keys, old.values, old.key_scale, old.value_scale, old.blocks)))
    tensors = {n: getattr(batch, n).to(device) for n in ("query", "block_table", "query_starts", "context_lens")}
    return replace(batch, cache=cache, **tensors)


def swap_heads_and_tokens(cache: KVCache) -> KVCache:
    """The same contents with tokens outside heads in memory: the other common order."""
    keys, values = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (cache.keys, cache.values))
    return KVCache(keys, values, cache.key_scale, cache.value_scale)


def _fill(cache: KVCache, block: int, held: int, generator: torch.Generator) -> None:
    """Random keys and values for the first tokens of a block; shared blocks are filled more than once."""
    for stored, scale in ((cache.keys, cache.key_scale), (cache.values, cache.value_scale)):
        rows = torch.randn((stored.shape[1], held, stored.shape[3]), generator=generator)
        if scale is not None and scale.numel() == 1:
            scale.fill_(0.125)
        elif scale is not None:
            scale[block, :, :held] = torch.rand((stored.shape[1], held), generator=generator) + 0.5
        rows = rows.to(stored.dtype)
        if stored.dtype in FP8_DTYPES:
            stored.view(torch.uint8)[block, :, :held] = rows.view(torch.uint8)
        else:
            stored[block, :, :held] = rows
