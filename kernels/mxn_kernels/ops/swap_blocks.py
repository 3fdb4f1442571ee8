"""A tier of KV blocks in host memory: blocks leave the chip and come back on a stream beside the computation.

Blocks are gathered by a kernel into a staging buffer, so that a transfer is one large copy over the bus and not one
per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.checks import need
from mxn_kernels.ops.move_blocks import move_blocks
from mxn_kernels.target import Target

Move = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer under way. `event` is None where it has happened already."""

    event: torch.cuda.Event | None

    def is_done(self) -> bool:
        return self.event is None or self.event.query()

    def hold_back(self) -> None:
        """Lets what is launched from now on start only after the transfer; the host goes on."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def wait(self) -> None:
        """Keeps the host until it is done; only then may host blocks be read or sent elsewhere."""
        if self.event is not None:
            self.event.synchronize()


class HostTier:
    """Host memory for whole blocks, all layers of a model side by side; page-locked where the chip is an accelerator.

    host (num_host_blocks, bytes of a block over all layers) uint8.
    """

    def __init__(
        self,
        caches: Sequence[KVCache],
        num_host_blocks: int,
        *,
        max_moves: int = 256,
        implementation: str | None = None,
        target: Target | None = None,
    ) -> None:
        """Args: caches: one per layer, of equal numbers of blocks. max_moves: blocks staged on the chip at a time."""
        need(bool(caches) and num_host_blocks > 0 and max_moves > 0, "needs a cache, a host block and a move to stage")
        for cache in caches:
            good = cache.blocks is not None and cache.num_blocks == caches[0].num_blocks
            need(good, "caches must have contiguous blocks (KVCache.allocate) and equal numbers of them")
        self._blocks = [cache.blocks for cache in caches]
        self._options = {"implementation": implementation, "target": target}
        self._max_moves = max_moves
        device = self._blocks[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        num_bytes = sum(blocks.shape[1] for blocks in self._blocks)
        self.host = torch.empty((num_host_blocks, num_bytes), dtype=torch.uint8, pin_memory=self._stream is not None)
        self._staging = torch.empty((max_moves, num_bytes), dtype=torch.uint8, device=device)

    def swap_out(self, moves: Sequence[Move]) -> Transfer:
        """Copies (block, host block) pairs to the host. What overwrites a block must be held back for the transfer.

        Raises: ValueError if a block is outside its tier or a host block comes twice; nothing is copied then.
        """
        return self._transfer([(host, block) for block, host in moves], is_out=True)

    def swap_in(self, moves: Sequence[Move]) -> Transfer:
        """Copies (host block, block) pairs to the chip. What reads a block must be held back for the transfer."""
        return self._transfer(list(moves), is_out=False)

    def _transfer(self, moves: list[Move], *, is_out: bool) -> Transfer:
        self._check(moves, is_out)
        if self._stream is None:
            self._copy(sorted(moves), is_out)
            return Transfer(None)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(sorted(moves), is_out)
            return Transfer(self._stream.record_event())

    def _copy(self, moves: list[Move], is_out: bool) -> None:
        """Moves sorted by host block, so that each run of neighbours there is one copy over the bus."""
        for begin in range(0, len(moves), self._max_moves):
            part = moves[begin : begin + self._max_moves]
            ids = torch.tensor([block for _, block in part], dtype=torch.int32, pin_memory=self._stream is not None)
            ids = ids.to(self._staging.device, non_blocking=True)
            if is_out:
                self._move(ids, is_out)
            for first, first_host, count in _runs([host for host, _ in part]):
                host = self.host[first_host : first_host + count]
                staged = self._staging[first : first + count]
                (host if is_out else staged).copy_(staged if is_out else host, non_blocking=True)
            if not is_out:
                self._move(ids, is_out)

    def _move(self, ids: torch.Tensor, is_out: bool) -> None:
        column = 0
        for blocks in self._blocks:
            staged = self._staging[:, column : column + blocks.shape[1]]
            column += blocks.shape[1]
            if is_out:
                move_blocks(blocks, staged, ids, None, **self._options)
            else:
                move_blocks(staged, blocks, None, ids, **self._options)

    def _check(self, moves: Sequence[Move], is_out: bool) -> None:
        num_host, num_blocks = self.host.shape[0], self._blocks[0].shape[0]
        for host, block in moves:
            good = 0 <= host < num_host and 0 <= block < num_blocks
            found = f"host block {host} and block {block}"
            need(good, f"host blocks are 0 to {num_host}, blocks 0 to {num_blocks} (exclusive), found {found}")
        written = [host if is_out else block for host, block in moves]
        need(len(set(written)) == len(written), f"a destination comes twice among {written}")


def _runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of consecutive ids: (index of the first, the first, how many)."""
    runs: list[tuple[int, int, int]] = []
    for index, number in enumerate(ids):
        if runs and number == runs[-1][1] + runs[-1][2]:
            start, first, count = runs[-1]
            runs[-1] = (start, first, count + 1)
        else:
            runs.append((index, number, 1))
    return runs
