"""The problem as arrays: rows that all demands share (pools, power caps) and blocks that share nothing else.

A block is one demand, or several that a relation joins. Its items are its options as the solver sees them: replicas
that run already and new ones are two items, and one item stands for replicas that are asked for and missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mxn.fleet.planner.linear_program import Vector
from mxn.fleet.planner.pricing import Pieces
from mxn.fleet.planner.problem import SLICES_PER_CHIP, Assignment, Demand, Option, Problem


@dataclass(frozen=True, slots=True)
class Item:
    """Replicas of one option that run already, or new ones. option: None stands for missing replicas."""

    demand: int
    option: Option | None
    is_running: bool
    upper: int
    domain: str


@dataclass(frozen=True, slots=True)
class Block:
    """Demands placed together, and their items: `first` up to, not including, `last`.

    is_plain: one demand without rules about failure domains, so that pricing is a covering knapsack.
    """

    demands: tuple[int, ...]
    first: int
    last: int
    is_plain: bool


@dataclass(frozen=True, slots=True)
class Goal:
    """What one stage minimises.

    costs, uppers, lowers: of each item; no lowers stand for zeros, and only plain blocks may have some.
    pieces: per demand, the penalty of load left unserved (see `pricing.Pieces`).
    negligible: a difference in value that nobody would notice.
    """

    costs: Vector
    uppers: NDArray[np.int64]
    pieces: tuple[Pieces, ...]
    negligible: float = 0.0
    lowers: NDArray[np.int64] | None = None

    def lowers_of(self, block: Block) -> NDArray[np.int64]:
        """Least counts of a block's items."""
        size = block.last - block.first
        return np.zeros(size, dtype=np.int64) if self.lowers is None else self.lowers[block.first : block.last]


@dataclass(frozen=True, slots=True)
class Pattern:
    """One block's part of a solution. counts: of its items. use: of each shared row."""

    counts: NDArray[np.int64]
    unserved: tuple[float, ...]
    cost: float
    use: Vector


class Instance:
    """A problem in arrays. limits: of the shared rows. covers: load share per replica. use: [items, rows]."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._pool_rows = {pool.name: row for row, pool in enumerate(problem.pools)}
        cap_rows = {cap.name: len(problem.pools) + row for row, cap in enumerate(problem.caps)}
        self.row_names = (*self._pool_rows, *cap_rows)
        self.limits = np.array(
            [float(pool.num_chips * SLICES_PER_CHIP) for pool in problem.pools] + [cap.watts for cap in problem.caps]
        )
        self.items: list[Item] = []
        self.blocks: list[Block] = []
        for members in _groups(problem):
            first = len(self.items)
            for index in members:
                self.items += self._items(index)
            demand = problem.demands[members[0]]
            is_plain = len(members) == 1 and not demand.survives_domain and demand.max_domain_share == 1
            self.blocks.append(Block(members, first, len(self.items), is_plain))
        self.block_of = {index: block for block in self.blocks for index in block.demands}
        self.covers = np.array([self._cover(item) for item in self.items])
        self.use = np.zeros((len(self.items), len(self.limits)))
        pools = {pool.name: pool for pool in problem.pools}
        for row, item in enumerate(self.items):
            if item.option is not None:
                self.use[row, self._pool_rows[item.option.pool]] = item.option.slices
                for cap in pools[item.option.pool].power_caps:
                    self.use[row, cap_rows[cap]] = item.option.watts

    @cached_property
    def uppers(self) -> NDArray[np.int64]:
        """Most replicas of each item that can be of use."""
        return np.array([item.upper for item in self.items], dtype=np.int64)

    @cached_property
    def demand_items(self) -> list[NDArray[np.int32]]:
        """The items of each demand."""
        found: list[list[int]] = [[] for _ in self.problem.demands]
        for row, item in enumerate(self.items):
            found[item.demand].append(row)
        return [np.array(rows, dtype=np.int32) for rows in found]

    @cached_property
    def weights(self) -> Vector:
        """The fewest slices that could serve each demand's load: what a share of it is worth beside another's."""
        weights = []
        for demand in self.problem.demands:
            rates = [option.capacity / option.slices for option in demand.options if option.capacity > 0]
            weights.append(demand.load / max(rates) if rates else 0.0)
        return np.array(weights)

    def pattern(self, block: Block, counts: NDArray[np.int64], goal: Goal, unserved: Sequence[float]) -> Pattern:
        """Counts of a block's items with what they cost and use. The penalty of `unserved` is counted by the caller."""
        items = slice(block.first, block.last)
        return Pattern(counts, tuple(unserved), float(goal.costs[items] @ counts), counts @ self.use[items])

    def assignment(self, patterns: Sequence[Pattern]) -> Assignment:
        """The replicas that the blocks' patterns, in order, stand for."""
        replicas: dict[str, dict[str, int]] = {demand.name: {} for demand in self.problem.demands}
        for block, pattern in zip(self.blocks, patterns, strict=True):
            for item, count in zip(self.items[block.first : block.last], pattern.counts.tolist(), strict=True):
                if item.option is not None and count:
                    counts = replicas[self.problem.demands[item.demand].name]
                    counts[item.option.name] = counts.get(item.option.name, 0) + count
        return Assignment(replicas=replicas)

    def _items(self, index: int) -> Iterator[Item]:
        demand = self.problem.demands[index]
        pools = {pool.name: pool for pool in self.problem.pools}
        for option in demand.options:
            pool = pools[option.pool]
            domain = pool.failure_domain or pool.name
            running = demand.running.get(option.name, 0)
            upper = self._upper(demand, option)
            if running:
                yield Item(index, option, True, min(running, upper), domain)
            if upper > running:
                yield Item(index, option, False, upper - running, domain)
        if demand.min_replicas:
            yield Item(index, None, False, demand.min_replicas, "")

    def _upper(self, demand: Demand, option: Option) -> int:
        """Enough to serve the load, and again to survive a lost domain, and no more than the pool holds."""
        room = int(self.limits[self._pool_rows[option.pool]] // option.slices)
        if option.capacity == 0:
            needed = demand.min_replicas
        else:
            needed = math.ceil(demand.load / option.capacity) * (2 if demand.survives_domain else 1)
            needed = max(needed, 1) + demand.min_replicas
        return min(room, needed if demand.max_replicas is None else min(needed, demand.max_replicas))

    def _cover(self, item: Item) -> float:
        load = self.problem.demands[item.demand].load
        if item.option is None:
            return 0.0
        return min(1.0, item.option.capacity / load) if load > 0 else 1.0


def _groups(problem: Problem) -> list[tuple[int, ...]]:
    """Demands joined by relations, each group in the problem's order."""
    index = {demand.name: i for i, demand in enumerate(problem.demands)}
    leader = list(range(len(problem.demands)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for relation in problem.relations:
        for name in relation.demands[1:]:
            a, b = sorted((find(index[relation.demands[0]]), find(index[name])))
            leader[b] = a
    members: dict[int, list[int]] = {}
    for i in range(len(leader)):
        members.setdefault(find(i), []).append(i)
    return [tuple(group) for group in members.values()]
