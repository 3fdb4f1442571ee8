"""Which sequences of a batch start with the same blocks, and whether reading those blocks once pays.

Prefix caching gives sequences with equal beginnings equal block ids, so groups are found from the block tables alone.
All of it is arithmetic on the host, done when the batch changes; the result is reused for every layer and step until
then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from mxn_kernels.kv_cache import KVCache

# What a chip reads from memory in the time that the two more launches take: about 4 us at 3 TB/s.
LAUNCH_BYTES = 12 << 20
ROWS_PER_PASS = 64  # query rows that read a prefix together; the kernels' tiles are no smaller


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences (rows of the batch) whose first `num_blocks` blocks are the same."""

    num_blocks: int
    members: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class SharedPrefix:
    """Groups laid out for the kernels. Holds while each row keeps its sequence and that sequence its first blocks.

    members (M) int32: rows, group after group. group_starts (G + 1) int32: where each group begins in members.
    prefix_tokens (G) int32. first_tokens (S) int32: tokens of each row that the shared pass takes, 0 without a group.
    is_room: the tensors' contents change between runs and `groups` only says how much they can hold (see `room`).
    """

    groups: tuple[PrefixGroup, ...]
    block_size: int
    num_seqs: int
    members: torch.Tensor
    group_starts: torch.Tensor
    prefix_tokens: torch.Tensor
    first_tokens: torch.Tensor
    is_room: bool = False
    max_prefix: int = field(init=False)
    num_members: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_prefix", max((g.num_blocks for g in self.groups), default=0) * self.block_size)
        object.__setattr__(self, "num_members", sum(len(g.members) for g in self.groups))

    @classmethod
    def of(
        cls, groups: Sequence[PrefixGroup], *, num_seqs: int, block_size: int, device: torch.device | str
    ) -> SharedPrefix:
        """Raises: ValueError if a row is outside the batch or in two groups, or a group is empty."""
        rows = [row for group in groups for row in group.members]
        if len(set(rows)) != len(rows) or any(not 0 <= row < num_seqs for row in rows):
            raise ValueError(f"members must be different rows from 0 to {num_seqs - 1}, found {rows}")
        if any(not group.members or group.num_blocks < 1 for group in groups):
            raise ValueError(f"each group needs a member and a block, found {list(groups)}")
        starts, first = [0], [0] * num_seqs
        for group in groups:
            starts.append(starts[-1] + len(group.members))
            for row in group.members:
                first[row] = group.num_blocks * block_size

        def tensor(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)

        return cls(
            groups=tuple(groups),
            block_size=block_size,
            num_seqs=num_seqs,
            members=tensor(rows),
            group_starts=tensor(starts),
            prefix_tokens=tensor([group.num_blocks * block_size for group in groups]),
            first_tokens=tensor(first),
        )

    @property
    def covers_all(self) -> bool:
        """Whether every row is known to be in a group."""
        return not self.is_room and self.num_members == self.num_seqs

    @classmethod
    def room(
        cls, tensors: Mapping[str, torch.Tensor], *, max_prefix_blocks: int, num_seqs: int, block_size: int
    ) -> SharedPrefix:
        """A plan to capture: whatever groups `fill` writes into its tensors before a replay are computed then.

        Args: tensors: named as in `room_shapes`, for `num_seqs` rows.
        """
        num_groups = tensors["prefix_tokens"].shape[0]
        shares = [tuple(range(index, num_seqs, num_groups)) for index in range(num_groups)]
        groups = tuple(PrefixGroup(max_prefix_blocks, share) for share in shares)
        return cls(groups=groups, block_size=block_size, num_seqs=num_seqs, is_room=True, **tensors)

    @staticmethod
    def room_shapes(num_seqs: int, num_groups: int) -> dict[str, int]:
        """Lengths of the tensors of a room, all int32."""
        return {
            "members": num_seqs,
            "group_starts": num_groups + 1,
            "prefix_tokens": num_groups,
            "first_tokens": num_seqs,
        }

    @staticmethod
    def fill(arrays: Mapping[str, Any], groups: Sequence[PrefixGroup], block_size: int) -> None:
        """Writes groups into a room's tensors (or numpy arrays of that shape). Groups beyond the room are left out."""
        arrays["first_tokens"][:] = 0
        position = 0
        for index in range(len(arrays["prefix_tokens"])):
            arrays["group_starts"][index] = position
            if index < len(groups):
                group = groups[index]
                end = position + len(group.members)
                arrays["members"][position:end] = group.members
                arrays["first_tokens"][list(group.members)] = group.num_blocks * block_size
                arrays["prefix_tokens"][index] = group.num_blocks * block_size
                position = end
            else:
                arrays["prefix_tokens"][index] = 0
        arrays["group_starts"][len(arrays["prefix_tokens"])] = position


def plan_shared_prefix(
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cache: KVCache,
    *,
    num_heads: int,
    launch_bytes: int = LAUNCH_BYTES,
) -> SharedPrefix | None:
    """The groups worth a pass of their own, or None if the batch is better served by `paged_decode`.

    Args: block_table (S, max_blocks) and context_lens (S), int32 on the CPU. cache: of one layer; what is decided holds
      for every layer of that shape.
    """
    kept = groups_that_pay(block_table, context_lens, cache, num_heads=num_heads, launch_bytes=launch_bytes)
    if not kept:
        return None
    return SharedPrefix.of(kept, num_seqs=block_table.shape[0], block_size=cache.block_size, device=cache.keys.device)


def groups_that_pay(
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cache: KVCache,
    *,
    num_heads: int,
    launch_bytes: int = LAUNCH_BYTES,
) -> tuple[PrefixGroup, ...]:
    """The groups of such a plan, those that save most first; none where `paged_decode` serves the batch better."""
    if block_table[:, 0].unique().numel() == block_table.shape[0]:
        return ()  # nobody shares even a first block
    saved = {
        group: saved_bytes(group, cache, num_heads)
        for group in find_groups(block_table, context_lens, cache.block_size)
    }
    kept = sorted((group for group in saved if saved[group] > 0), key=lambda group: -saved[group])
    return tuple(kept) if sum(saved[group] for group in kept) > launch_bytes else ()


def saved_bytes(group: PrefixGroup, cache: KVCache, num_heads: int) -> int:
    """Traffic model of one layer: what a shared pass reads less, minus the partial results it writes and reads back.

    Unshared, every member reads the prefix. Shared, each tile of query rows reads it once.
    """
    scales = 8 if cache.scaling == "token_head" else 0
    per_token = cache.num_kv_heads * ((cache.key_dim + cache.value_dim) * cache.dtype.itemsize + scales)
    num_members = len(group.members)
    rows = num_members * (num_heads // cache.num_kv_heads)
    passes = -(-rows // ROWS_PER_PASS)
    partials = 2 * 2 * num_members * num_heads * (cache.value_dim + 1) * 4
    return (num_members - passes) * group.num_blocks * cache.block_size * per_token - partials


def find_groups(block_table: torch.Tensor, context_lens: torch.Tensor, block_size: int) -> list[PrefixGroup]:
    """Disjoint groups that together leave the fewest prefix tokens to read: (members - 1) x blocks summed is largest.

    Sequences that share blocks form a tree. A node shared by n sequences saves (n - 1) x its depth, or what its
    children save together, whichever is more; solved bottom-up over the sorted tables. Only full blocks count.
    Args: as `plan_shared_prefix`. Returns: groups of two or more, in order of their first member.
    """
    table = block_table.detach().to("cpu", torch.int32).contiguous()
    full_blocks = [length // block_size for length in context_lens.tolist()]
    rows = [row for row in range(table.shape[0]) if full_blocks[row]]
    if len(rows) < 2:
        return []
    width = table.shape[1] * 4
    raw = bytes(table.untyped_storage())[table.storage_offset() * 4 :]
    # Compared as bytes: not in numeric order, but rows with a common beginning do end up side by side.
    rows.sort(key=lambda row: raw[row * width : row * width + 4 * full_blocks[row]])

    shared = _common_lengths(table, rows, full_blocks)
    open_nodes = [_Node(depth=0, first=0)]
    for end in range(1, len(rows) + 1):
        depth = shared[end - 1] if end < len(rows) else 0
        first, best = end - 1, _Best(0, ())
        while open_nodes[-1].depth > depth:
            node = open_nodes.pop()
            node.add(best)
            first, best = node.first, node.close(rows[node.first : end])
        if open_nodes[-1].depth < depth:
            open_nodes.append(_Node(depth=depth, first=first))
        open_nodes[-1].add(best)
    return sorted(open_nodes[0].groups, key=lambda group: group.members[0])


@dataclass(frozen=True, slots=True)
class _Best:
    saved: int
    groups: tuple[PrefixGroup, ...]


@dataclass(slots=True)
class _Node:
    """A common beginning of `depth` blocks, from the `first` of the sorted rows on."""

    depth: int
    first: int
    saved: int = 0
    groups: list[PrefixGroup] = field(default_factory=list)

    def add(self, child: _Best) -> None:
        self.saved += child.saved
        self.groups.extend(child.groups)

    def close(self, rows: Sequence[int]) -> _Best:
        alone = (len(rows) - 1) * self.depth
        if alone >= self.saved:
            return _Best(alone, (PrefixGroup(self.depth, tuple(sorted(rows))),))
        return _Best(self.saved, tuple(self.groups))


def _common_lengths(table: torch.Tensor, rows: list[int], full_blocks: list[int]) -> list[int]:
    """For each two neighbours, how many blocks from the first on they share."""
    ordered = table[rows]
    same = (ordered[1:] == ordered[:-1]).to(torch.int32).cumprod(1).sum(1).tolist()
    limits = [min(full_blocks[a], full_blocks[b]) for a, b in pairwise(rows)]
    return [min(length, limit) for length, limit in zip(same, limits, strict=True)]
