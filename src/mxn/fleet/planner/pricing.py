"""The cheapest integer mix of replicas for one demand at given prices: a covering knapsack, solved exactly.

minimise    sum of cost_i x_i + penalty(u)
subject to  sum of cover_i x_i + u >= 1,   min_count <= sum of x_i <= max_count,   0 <= x_i <= upper_i, x integer

`u` is the share of the load left unserved; its penalty is convex and piecewise linear. Depth first over the items in
order of cost per cover, which makes the linear relaxation of what is left a bound that is read off the next item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxn.fleet.planner.linear_program import InfeasibleError, build_rows, solve

TOLERANCE = 1e-4
"""Where nothing is to be proven to the last digit."""
MAX_NODES = 10_000
"""About 10 ms. A search that needs more is left to HiGHS, whose cuts are worth their start-up time then."""
_NEARLY = 1e-9

Pieces = Sequence[tuple[float, float]]
"""(length, slope) in order of rising slope. Unserved share beyond their total length is not allowed."""


@dataclass(frozen=True, slots=True)
class Mix:
    """counts: of the items given. bound: no mix costs less."""

    counts: list[int]
    unserved: float
    cost: float
    bound: float


def cheapest_mix(
    costs: Sequence[float],
    covers: Sequence[float],
    uppers: Sequence[int],
    pieces: Pieces,
    *,
    min_count: int = 0,
    max_count: int | None = None,
    tolerance: float = TOLERANCE,
    need: float = 1.0,
) -> Mix | None:
    """The cheapest mix, or None when there is none.

    Args: costs: at least 0 each. covers: share of the load that one replica serves, 0 to 1. tolerance: branches that
        cannot improve the best by more than this part of it are cut; the bound is lower by as much. need: instead of
        the whole load.
    """
    free = sum(length for length, slope in pieces if slope == 0)  # taken first: it costs nothing
    short, pieces = max(0.0, need - free), [piece for piece in pieces if piece[1] > 0]
    largest = math.inf if max_count is None else max_count
    search = _Search(costs, covers, uppers, pieces, min_count, largest, tolerance)
    search.descend(0, short, 0.0, 0)
    if search.num_nodes > MAX_NODES:
        found = _by_highs(costs, covers, uppers, pieces, min_count, max_count, tolerance, short)
    elif search.best is not None:
        found = search.best, search.best_cost, search.best_cost * (1 - tolerance)
    else:
        found = None
    if found is None:
        return None
    unserved = need - sum(count * cover for count, cover in zip(found[0], covers, strict=True))
    return Mix(found[0], unserved if unserved > _NEARLY else 0.0, found[1], found[2])


def penalty(pieces: Pieces, share: float) -> float:
    """The penalty of leaving `share` unserved; infinite beyond the pieces."""
    total = 0.0
    for length, slope in pieces:
        part = min(length, share)
        total += slope * part
        share -= part
        if share <= _NEARLY:
            return total
    return math.inf


def _by_highs(
    costs: Sequence[float],
    covers: Sequence[float],
    uppers: Sequence[int],
    pieces: Pieces,
    min_count: int,
    max_count: int | None,
    tolerance: float,
    need: float,
) -> tuple[list[int], float, float] | None:
    """The same problem as an integer program: counts, cost and a bound on it."""
    num_items, num_pieces = len(costs), len(pieces)
    items = np.arange(num_items, dtype=np.int32)
    rows = build_rows(
        [
            (np.arange(num_items + num_pieces, dtype=np.int32), np.r_[covers, np.ones(num_pieces)]),
            (items, np.ones(num_items)),
        ],
        np.array([need, min_count]),
        np.array([math.inf, math.inf if max_count is None else max_count]),
    )
    try:
        found = solve(
            np.r_[costs, [slope for _, slope in pieces]],
            np.r_[np.array(uppers, dtype=float), [length for length, _ in pieces]],
            rows,
            is_integer=np.r_[np.ones(num_items, dtype=bool), np.zeros(num_pieces, dtype=bool)],
            gap=tolerance,
        )
    except InfeasibleError:
        return None
    counts = np.rint(found.values[:num_items]).astype(int).tolist()
    return counts, found.objective, found.bound


class _Search:
    def __init__(
        self,
        costs: Sequence[float],
        covers: Sequence[float],
        uppers: Sequence[int],
        pieces: Pieces,
        min_count: int,
        max_count: float,
        tolerance: float,
    ) -> None:
        self.best: list[int] | None = None
        self.best_cost = math.inf
        self.num_nodes = 0
        self._pieces, self._kept = pieces, 1 - tolerance
        self._min_count, self._max_count = min_count, max_count
        self._costs, self._uppers = costs, uppers
        self._counts = [0] * len(costs)
        useful = [i for i in range(len(costs)) if covers[i] > 0 and uppers[i] > 0]
        order = sorted(useful, key=lambda i: (costs[i] / covers[i], -covers[i], i))
        self._order = _without_dominated(order, costs, covers, uppers) if max_count == math.inf else order
        self._items = [(i, costs[i], covers[i], costs[i] / covers[i], uppers[i]) for i in self._order]
        self._by_cost = sorted(range(len(costs)), key=lambda i: (costs[i], i)) if min_count else []

    def relaxed(self, need: float, depth: int) -> float:
        """What covering `need` costs at least with the items from `depth` on, were replicas divisible."""
        ratio = self._items[depth][3] if depth < len(self._items) else math.inf
        total = 0.0
        for length, slope in self._pieces:
            if slope >= ratio:
                break
            part = length if length < need else need
            total += slope * part
            need -= part
            if need <= _NEARLY:
                return total
        return total + ratio * need

    def descend(self, depth: int, need: float, cost: float, count: int) -> None:
        """Tries every count of the item at `depth`, most first."""
        self.num_nodes += 1
        self._offer(need, cost, count)
        if need <= _NEARLY or depth == len(self._items) or self.num_nodes > MAX_NODES:
            return
        index, item_cost, cover, ratio, upper = self._items[depth]
        is_cheapest = not self._pieces or self._pieces[0][1] >= ratio
        room = self._max_count - count
        most = min(upper, math.ceil(need / cover - _NEARLY), room)
        for number in range(int(most), -1, -1):
            left = need - number * cover
            spent = cost + number * item_cost
            cut = self.best_cost * self._kept if self.best is not None else math.inf
            if spent + (self.relaxed(left, depth + 1) if left > _NEARLY else 0.0) < cut:
                self._counts[index] = number
                self.descend(depth + 1, max(0.0, left), spent, count + number)
            elif is_cheapest and left > _NEARLY:
                break  # fewer of this item leave more to dearer ones, so the bound only rises from here on
        self._counts[index] = 0

    def _offer(self, need: float, cost: float, count: int) -> None:
        """Takes the mix as it stands, the rest unserved, if it is the cheapest so far."""
        total = cost + (penalty(self._pieces, need) if need > _NEARLY else 0.0)
        if total >= self.best_cost:
            return
        counts, missing = None, self._min_count - count
        if missing > 0:
            counts = list(self._counts)
            for i in self._by_cost:
                more = min(missing, self._uppers[i] - counts[i])
                if more > 0:
                    counts[i] += more
                    total += more * self._costs[i]
                    missing -= more
            if missing > 0 or total >= self.best_cost:
                return
        self.best = list(self._counts) if counts is None else counts
        self.best_cost = total


def _without_dominated(
    order: Sequence[int], costs: Sequence[float], covers: Sequence[float], uppers: Sequence[int]
) -> list[int]:
    """Leaves out items for which another, of which there is enough, costs no more and covers no less."""
    kept: list[int] = []
    for i in order:
        enough = (j for j in kept if costs[j] <= costs[i] and covers[j] >= covers[i])
        if not any(uppers[j] * covers[j] >= 1 for j in enough):
            kept.append(i)
    return kept
