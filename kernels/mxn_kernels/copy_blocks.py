"""Copies whole KV blocks within a layer's cache, in order: a later move sees what an earlier one wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mxn_kernels.cpu.library import Workspace
from mxn_kernels.cpu_cache import LayerCache


def copy_blocks(cache: LayerCache, moves: Sequence[tuple[int, int]], *, workspace: Workspace) -> None:
    """Args: moves: (source, destination) block ids.

    Raises: ValueError naming a block outside the cache; nothing is copied then.
    """
    _check(cache, moves)
    if not moves:
        return
    pairs = torch.tensor(moves, dtype=torch.int64)
    for tensor in (cache.keys, cache.values):
        block_bytes = tensor[0].numel() * tensor.element_size()
        workspace.library.copy_blocks(tensor.data_ptr(), block_bytes, pairs.data_ptr(), len(moves))


def copy_blocks_reference(
    cache: LayerCache, moves: Sequence[tuple[int, int]], *, workspace: Workspace | None = None
) -> None:
    """The same in torch."""
    _check(cache, moves)
    for source, destination in moves:
        cache.keys[destination] = cache.keys[source].clone()
        cache.values[destination] = cache.values[source].clone()


def _check(cache: LayerCache, moves: Sequence[tuple[int, int]]) -> None:
    for move in moves:
        if not all(0 <= block < cache.num_blocks for block in move):
            raise ValueError(f"blocks are 0 to {cache.num_blocks} (exclusive), found move {move[0]} -> {move[1]}")
