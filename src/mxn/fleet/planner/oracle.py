"""Prices blocks: the cheapest pattern of one block when shared rows have prices, and what no pattern can undercut."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mxn.fleet.planner.blocks import Block, Goal, Instance, Item, Pattern
from mxn.fleet.planner.linear_program import InfeasibleError, Vector, build_rows, solve
from mxn.fleet.planner.pricing import TOLERANCE, cheapest_mix, penalty

_JUST_BELOW_ONE = 1 - 1e-6


class Oracle:
    """Answers pricing questions about one instance under one goal. tolerance: see `pricing.cheapest_mix`."""

    def __init__(self, instance: Instance, goal: Goal, tolerance: float = TOLERANCE) -> None:
        self.instance = instance
        self.goal = goal
        self._tolerance = tolerance

    def cheapest(
        self, block: Block, prices: Vector, room: Vector | None = None, *, is_quick: bool = False
    ) -> tuple[Pattern, float] | None:
        """The block's cheapest pattern at these row prices, and a bound on the priced cost of every pattern.

        room: what is left of each row; None when the prices alone shall decide. The bound holds without `room` only.
        is_quick: gives up where an integer program would be needed to keep within the room.
        Returns None when nothing fits.
        """
        items = slice(block.first, block.last)
        use = self.instance.use[items]
        uppers = self.goal.uppers[items]
        if room is not None:
            uppers = np.minimum(uppers, _fitting(use, room))
        costs = np.maximum(0.0, self.goal.costs[items] + use @ prices)
        if block.is_plain:
            found = self._cheapest_plain(block, costs, uppers)
            if found is not None and (room is None or np.all(found[0] @ use <= room + 1e-6)):
                return self._priced(block, *found)
            if found is None or is_quick:
                return None
        return self._cheapest_of_group(block, costs, uppers, room)

    def _cheapest_plain(
        self, block: Block, costs: Vector, uppers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[float], float] | None:
        index = block.demands[0]
        demand = self.instance.problem.demands[index]
        covers, lowers = self.instance.covers[block.first : block.last], self.goal.lowers_of(block)
        if demand.load == 0 and demand.min_replicas == 0:
            return lowers, [0.0], float(costs @ lowers)
        given = int(lowers.sum())
        mix = cheapest_mix(
            costs.tolist(),
            covers.tolist(),
            (uppers - lowers).tolist(),
            self.goal.pieces[index] if demand.load > 0 else ((1.0, 0.0),),
            min_count=max(0, demand.min_replicas - given),
            max_count=None if demand.max_replicas is None else demand.max_replicas - given,
            tolerance=self._tolerance,
            need=max(0.0, 1.0 - float(covers @ lowers)),
        )
        if mix is None:
            return None
        return np.array(mix.counts, dtype=np.int64) + lowers, [mix.unserved], mix.bound + float(costs @ lowers)

    def _cheapest_of_group(
        self, block: Block, costs: Vector, uppers: NDArray[np.int64], room: Vector | None
    ) -> tuple[Pattern, float] | None:
        program = _GroupProgram(self.instance, self.goal, block, uppers)
        for item, lower in enumerate(self.goal.lowers_of(block).tolist()):
            if lower:
                program.add({item: 1.0}, lower=float(lower))
        if room is not None:
            use = self.instance.use[block.first : block.last]
            for row in np.flatnonzero(use.any(axis=0)):
                program.add({int(i): float(use[i, row]) for i in np.flatnonzero(use[:, row])}, upper=float(room[row]))
        found = program.minimise(costs, self._tolerance)
        return None if found is None else self._priced(block, *found)

    def _priced(
        self, block: Block, counts: NDArray[np.int64], unserved: list[float], bound: float
    ) -> tuple[Pattern, float]:
        pattern = self.instance.pattern(block, counts, self.goal, unserved)
        penalties = (penalty(self.goal.pieces[d], u) for d, u in zip(block.demands, unserved, strict=True))
        return Pattern(counts, pattern.unserved, pattern.cost + sum(penalties), pattern.use), bound


class _GroupProgram:
    """A block as an integer program: what a covering knapsack cannot say about failure domains and relations.

    Columns: the block's items, the unserved pieces of each demand, then a yes or no per (demand, domain) as needed.
    """

    def __init__(self, instance: Instance, goal: Goal, block: Block, uppers: NDArray[np.int64]) -> None:
        self._block, self._instance = block, instance
        self._num_items = block.last - block.first
        self._uppers = [float(u) for u in uppers]
        self._extra_costs: list[float] = []
        self._is_integer = [True] * self._num_items
        self._entries: list[tuple[NDArray[np.int32], Vector]] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._piece_columns: dict[int, list[int]] = {}
        for index in block.demands:
            self._add_demand(index, goal)
        self._add_relations()

    def add(self, row: dict[int, float], *, lower: float = -math.inf, upper: float = math.inf) -> None:
        """A row over columns."""
        self._entries.append((np.array(list(row), dtype=np.int32), np.array(list(row.values()), dtype=float)))
        self._lower.append(lower)
        self._upper.append(upper)

    def minimise(self, costs: Vector, tolerance: float) -> tuple[NDArray[np.int64], list[float], float] | None:
        """Counts, unserved share per demand and a bound on the cost, penalties included."""
        try:
            found = solve(
                np.r_[costs, self._extra_costs],
                np.array(self._uppers),
                build_rows(self._entries, np.array(self._lower), np.array(self._upper)),
                is_integer=np.array(self._is_integer),
                gap=tolerance,
            )
        except InfeasibleError:
            return None
        counts = np.rint(found.values[: self._num_items]).astype(np.int64)
        return counts, [self._unserved(index, counts, found.values) for index in self._block.demands], found.bound

    def _unserved(self, index: int, counts: NDArray[np.int64], values: Vector) -> float:
        """Pieces that cost nothing may be taken without need; only a lost domain makes them more than is short."""
        demand = self._instance.problem.demands[index]
        pieces = float(sum(values[c] for c in self._piece_columns[index]))
        if demand.survives_domain or demand.load == 0:
            return pieces if demand.load else 0.0
        mine = self._instance.demand_items[index]
        covered = float(self._instance.covers[mine] @ counts[mine - self._block.first])
        return min(pieces, max(0.0, 1.0 - covered))

    def _add_demand(self, index: int, goal: Goal) -> None:
        demand = self._instance.problem.demands[index]
        mine = [int(row) - self._block.first for row in self._instance.demand_items[index]]
        covers = self._instance.covers[self._block.first : self._block.last]
        pieces = [
            self._column(length, slope) for length, slope in (goal.pieces[index] if demand.load > 0 else ((1.0, 0.0),))
        ]
        self._piece_columns[index] = pieces
        self.add({**{i: covers[i] for i in mine}, **dict.fromkeys(pieces, 1.0)}, lower=1.0)
        high = math.inf if demand.max_replicas is None else float(demand.max_replicas)
        self.add(dict.fromkeys(mine, 1.0), lower=float(demand.min_replicas), upper=high)
        for _, members in self._by_domain(mine).items():
            outside = [i for i in mine if i not in members]
            if demand.survives_domain:
                self.add({**{i: covers[i] for i in outside}, **dict.fromkeys(pieces, 1.0)}, lower=1.0)
            if demand.max_domain_share < 1:
                share = demand.max_domain_share
                row = {i: (1.0 if i in members else 0.0) - share for i in mine if self._item(i).option is not None}
                self.add(row, upper=_JUST_BELOW_ONE)

    def _add_relations(self) -> None:
        problem = self._instance.problem
        names = {problem.demands[index].name: index for index in self._block.demands}
        for relation in problem.relations:
            members = [names[name] for name in relation.demands if name in names]
            if len(members) < 2:
                continue
            if relation.kind == "together":
                self.add(dict.fromkeys(self._presence(members).values(), 1.0), upper=1.0)
                continue
            present = [self._presence([index]) for index in members]
            for domain in sorted({domain for columns in present for domain in columns}):
                self.add({columns[domain]: 1.0 for columns in present if domain in columns}, upper=1.0)

    def _presence(self, demands: list[int]) -> dict[str, int]:
        """A yes or no per failure domain: whether any of the demands has replicas there."""
        mine = [int(row) - self._block.first for index in demands for row in self._instance.demand_items[index]]
        columns = {}
        for domain, members in self._by_domain(mine).items():
            columns[domain] = self._column(1.0, 0.0, is_integer=True)
            for i in members:
                self.add({i: 1.0, columns[domain]: -max(1.0, self._uppers[i])}, upper=0.0)
        return columns

    def _by_domain(self, items: list[int]) -> dict[str, set[int]]:
        domains: dict[str, set[int]] = {}
        for i in items:
            if self._item(i).option is not None:
                domains.setdefault(self._item(i).domain, set()).add(i)
        return domains

    def _item(self, i: int) -> Item:
        return self._instance.items[self._block.first + i]

    def _column(self, upper: float, cost: float, *, is_integer: bool = False) -> int:
        self._uppers.append(upper)
        self._extra_costs.append(cost)
        self._is_integer.append(is_integer)
        return len(self._uppers) - 1


def _fitting(use: Vector, room: Vector) -> NDArray[np.int64]:
    """How many replicas of each item fit into what is left, were it alone."""
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(use > 0, np.floor((room + 1e-6) / use), np.inf).min(axis=1, initial=np.inf)
    return np.clip(np.where(np.isinf(each), 2**31, each), 0, 2**31).astype(np.int64)
