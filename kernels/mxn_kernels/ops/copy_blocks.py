"""Copies whole KV blocks within a cache, in order: a later move sees what an earlier one wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.checks import need
from mxn_kernels.ops.move_blocks import move_blocks
from mxn_kernels.target import Target

Move = tuple[int, int]


def copy_blocks(
    caches: Sequence[KVCache],
    moves: Sequence[Move],
    *,
    implementation: str | None = None,
    target: Target | None = None,
) -> None:
    """Args: caches: the layers, each with contiguous blocks. moves: (source, destination) block ids.

    Raises: ValueError naming a block outside a cache, before anything is copied.
    """
    for cache in caches:
        need(cache.blocks is not None, "copying needs caches whose blocks are contiguous (KVCache.allocate)")
        for source, destination in moves:
            good = 0 <= source < cache.num_blocks and 0 <= destination < cache.num_blocks
            need(good, f"blocks are 0 to {cache.num_blocks} (exclusive), found move {source} -> {destination}")
    for wave in independent_moves(moves):
        for cache in caches:
            ids = torch.tensor(wave, dtype=torch.int32).T.contiguous().to(cache.blocks.device, non_blocking=True)
            move_blocks(cache.blocks, cache.blocks, ids[0], ids[1], implementation=implementation, target=target)


def copy_blocks_reference(caches: Sequence[KVCache], moves: Sequence[Move]) -> None:
    """The same in torch, one move after another."""
    for cache in caches:
        for source, destination in moves:
            cache.blocks[destination] = cache.blocks[source].clone()


def independent_moves(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """Runs of moves that may happen at once: none writes what another reads or writes.

    Moves onto themselves are left out.
    """
    wave: list[Move] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, destination in moves:
        if source == destination:
            continue
        if source in written or destination in written or destination in read:
            yield wave
            wave, read, written = [], set(), set()
        wave.append((source, destination))
        read.add(source)
        written.add(destination)
    if wave:
        yield wave
