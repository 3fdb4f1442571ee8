"""All mixes of one demand that cost little more than its cheapest, less those that another makes pointless.

Proofs need them: a plan better than a known one holds no pattern whose priced cost is above its block's cheapest by
more than the known value is above the bound. Labels, mixes that do not cover everything yet, grow item by item. One is
dropped when no completion of it is cheap enough, or when another that uses the same covers as much for no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mxn.fleet.planner.blocks import Block, Pattern
from mxn.fleet.planner.linear_program import Vector
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.pricing import Pieces, penalty

_GRID = 1000
"""Steps of the table that says what covering the rest costs at least."""
_NEARLY = 1e-9

Counts = NDArray[np.int64]


def patterns_within(
    oracle: Oracle, block: Block, prices: Vector, most: float, rows: Counts, max_labels: int
) -> list[Pattern] | None:
    """Patterns of a plain block whose priced cost is at most `most`; of those that use the same, the cheapest.

    Args: rows: the shared rows that matter; what a pattern uses of others is not looked at.
    Returns: None when that takes more than `max_labels` labels at once.
    """
    instance, index = oracle.instance, block.demands[0]
    demand, items = instance.problem.demands[index], slice(block.first, block.last)
    shared = instance.use[items]
    pieces: Pieces = oracle.goal.pieces[index] if demand.load > 0 else ((1.0, 0.0),)
    given = oracle.goal.lowers_of(block)
    menu = _Menu(
        costs=oracle.goal.costs[items],
        priced=np.maximum(0.0, oracle.goal.costs[items] + shared @ prices),
        covers=instance.covers[items],
        use=shared[:, rows],
        uppers=oracle.goal.uppers[items] - given,
        fewest=demand.min_replicas,
        largest=math.inf if demand.max_replicas is None else demand.max_replicas,
    )
    chosen = menu.useful(most)
    free = sum(length for length, slope in pieces if slope == 0)  # taken first: it costs nothing
    paid = [piece for piece in pieces if piece[1] > 0]
    floors = _floors(menu, chosen, paid, most)
    labels, done = _Labels.start(menu, given, 1.0 - free, len(chosen)), []
    for depth, item in enumerate(chosen.tolist()):
        labels = labels.grown(menu, depth, item)
        step = np.clip(np.floor(labels.need * _GRID + 1e-7), 0, _GRID).astype(np.int64)
        labels = labels.where(labels.priced + floors[depth + 1, step] <= most)
        is_whole = (labels.need == 0) & (labels.number >= menu.fewest)
        done.append(labels.where(is_whole))
        labels = labels.where(~is_whole).undominated(menu.is_counted)
        if len(labels.need) > max_labels:
            return None
    total = labels.priced + _penalties(paid, labels.need)
    done.append(labels.where((labels.number >= menu.fewest) & (total <= most)))
    found = _Labels.joined(done)
    return [
        _pattern(oracle, block, chosen, counts, given, pieces)
        for counts in found.counts[_cheapest_of_each_use(found.cost + _penalties(paid, found.need), found.use)]
    ]


@dataclass(frozen=True, slots=True)
class _Menu:
    """What a block's items cost, cover and use. fewest, largest: number of replicas in all."""

    costs: Vector
    priced: Vector
    covers: Vector
    use: Vector
    uppers: Counts
    fewest: int
    largest: float

    @property
    def is_counted(self) -> bool:
        """Whether the number of replicas matters."""
        return bool(self.fewest) or self.largest < math.inf

    def useful(self, most: float) -> Counts:
        """Items worth looking at: those that use shared rows first, then by cost of what they cover.

        Another item of which there is enough, no worse in anything, makes one useless.
        """
        can = (self.uppers > 0) & (self.priced <= most) & ((self.covers > 0) | (self.fewest > 0))
        with np.errstate(divide="ignore"):
            ratio = np.where(self.covers > 0, self.priced / np.maximum(self.covers, 1e-300), np.inf)
        order = np.flatnonzero(can)
        order = order[np.lexsort((order, -self.covers[order], ratio[order]))]
        kept: list[int] = []
        enough = self.uppers * self.covers >= 1 - _NEARLY
        for i in order if not self.fewest else ():
            known = np.array([j for j in kept if enough[j]], dtype=np.int64)
            better = (self.costs[known] <= self.costs[i]) & (self.covers[known] >= self.covers[i])
            if not np.any(better & np.all(self.use[known] <= self.use[i], axis=1)):
                kept.append(int(i))
        chosen = np.array(kept if not self.fewest else order, dtype=np.int64)
        return chosen[np.argsort(~self.use[chosen].any(axis=1), kind="stable")]


@dataclass(frozen=True, slots=True)
class _Labels:
    """Mixes begun. need: share of the load still to be covered. number: of replicas. counts: of the items chosen."""

    need: Vector
    priced: Vector
    cost: Vector
    use: Vector
    number: Counts
    counts: Counts

    @classmethod
    def start(cls, menu: _Menu, given: Counts, need: float, num_items: int) -> _Labels:
        """One label: the replicas that every mix must have."""
        return cls(
            np.array([max(0.0, need - float(menu.covers @ given))]),
            np.array([float(menu.priced @ given)]),
            np.array([float(menu.costs @ given)]),
            (given @ menu.use)[None, :],
            np.array([given.sum()]),
            np.zeros((1, num_items), dtype=np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[_Labels]) -> _Labels:
        return cls(
            np.concatenate([part.need for part in parts]),
            np.concatenate([part.priced for part in parts]),
            np.concatenate([part.cost for part in parts]),
            np.concatenate([part.use for part in parts]),
            np.concatenate([part.number for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )

    def where(self, chosen: NDArray[np.bool_] | Counts) -> _Labels:
        return _Labels(
            self.need[chosen],
            self.priced[chosen],
            self.cost[chosen],
            self.use[chosen],
            self.number[chosen],
            self.counts[chosen],
        )

    def grown(self, menu: _Menu, depth: int, item: int) -> _Labels:
        """Every label with every number of an item that may still be of use."""
        lacking = np.maximum(0, menu.fewest - self.number)
        cover = menu.covers[item]
        wanted = np.ceil(np.maximum(self.need, 0.0) / cover - _NEARLY) if cover > 0 else np.zeros(len(self.need))
        most = np.maximum(lacking, np.minimum(wanted, menu.largest - self.number))
        most = np.minimum(most, min(float(menu.uppers[item]), menu.largest)).astype(np.int64)
        parent = np.repeat(np.arange(len(most)), most + 1)
        number = np.arange(len(parent)) - np.repeat(np.cumsum(most + 1) - (most + 1), most + 1)
        counts = self.counts[parent]
        counts[:, depth] = number
        need = self.need[parent] - number * cover
        return _Labels(
            np.where(need <= _NEARLY, 0.0, need),
            self.priced[parent] + number * menu.priced[item],
            self.cost[parent] + number * menu.costs[item],
            self.use[parent] + number[:, None] * menu.use[item],
            self.number[parent] + number,
            counts,
        )

    def undominated(self, is_counted: bool) -> _Labels:
        """Of labels that use the same, those that cover more than all cheaper ones."""
        if len(self.need) < 2:
            return self
        use = np.column_stack([self.use, self.number]) if is_counted else self.use
        key = use @ np.random.default_rng(1).random(use.shape[1])  # brings equal rows together; nothing else
        order = np.lexsort((self.need, self.cost, key))
        need, use = self.need[order], use[order]
        group = np.cumsum(np.r_[0, np.any(use[1:] != use[:-1], axis=1)])
        shifted = need - 2.0 * group  # a later group lies below all before it
        is_less = np.r_[True, shifted[1:] < np.minimum.accumulate(shifted)[:-1]]
        return self.where(order[is_less])


def _floors(menu: _Menu, chosen: Counts, pieces: Pieces, most: float) -> Vector:
    """[depth, step]: what covering step / _GRID costs at least with the items from `depth` on, unserved load included.

    Covers are rounded up to steps, so the table errs on the cheap side.
    """
    floors = np.empty((len(chosen) + 1, _GRID + 1))
    floors[-1] = _penalties(pieces, np.arange(_GRID + 1) / _GRID)
    for depth in range(len(chosen) - 1, -1, -1):
        item, best = chosen[depth], floors[depth + 1].copy()
        cover, price = menu.covers[item], float(menu.priced[item])
        number, upper = 1, int(menu.uppers[item])
        while cover > 0 and number <= upper and number * price <= most:
            step = math.ceil(number * cover * _GRID - 1e-7)
            rest = floors[depth + 1, np.maximum(0, np.arange(_GRID + 1) - step)]
            np.minimum(best, number * price + rest, out=best)
            if step >= _GRID:
                break
            number += 1
        floors[depth] = best
    return floors


def _penalties(pieces: Pieces, need: Vector) -> Vector:
    """`pricing.penalty` of many shares."""
    total, left = np.zeros(len(need)), np.maximum(0.0, need)
    for length, slope in pieces:
        part = np.minimum(length, left)
        total += slope * part
        left = left - part
    return np.where(left > _NEARLY, np.inf, total)


def _cheapest_of_each_use(costs: Vector, use: Vector) -> Counts:
    """Indices of patterns without another that costs no more and uses no more of any row."""
    left = np.lexsort((use.sum(axis=1), costs))
    kept = []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(first)
        left = left[~np.all(use[left] >= use[first] - _NEARLY, axis=1)]
    return np.array(kept, dtype=np.int64)


def _pattern(oracle: Oracle, block: Block, chosen: Counts, counts: Counts, given: Counts, pieces: Pieces) -> Pattern:
    instance = oracle.instance
    whole = given.copy()
    whole[chosen] += counts
    has_load = instance.problem.demands[block.demands[0]].load > 0
    unserved = max(0.0, 1.0 - float(whole @ instance.covers[block.first : block.last])) if has_load else 0.0
    unserved = 0.0 if unserved <= _NEARLY else unserved
    pattern = instance.pattern(block, whole, oracle.goal, [unserved])
    return Pattern(whole, pattern.unserved, pattern.cost + penalty(pieces, unserved), pattern.use)
