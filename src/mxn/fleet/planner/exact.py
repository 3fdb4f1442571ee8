"""Closes a gap altogether: every pattern that a better plan could hold is listed, and one of each block is picked.

At prices that prove a bound, a pattern's regret is how far its priced cost is above its block's cheapest. The regrets
of a plan add up to no more than its value is above the bound. So a plan better than the best known holds only patterns
that regret less than the gap; where these are few enough to be listed, an integer program over them settles the matter.
Where they are too many, the solutions are split in two by the count of one item; each half has a bound of its own.
Source: Baldacci, Christofides, Mingozzi (2008), who route vehicles this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from mxn.fleet.planner.blocks import Pattern
from mxn.fleet.planner.decomposition import Decomposition
from mxn.fleet.planner.enumeration import patterns_within
from mxn.fleet.planner.linear_program import InfeasibleError, Vector, build_rows, solve
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.search import value_of

_TOLERANCE = 1e-8
_ROUNDS = 60
_FIRST_WINDOW, _WIDER = 3e-4, 2.0
"""Share of the bound that a pattern may regret at first, and how fast the window grows."""
_MAX_LABELS, _MAX_PATTERNS = 4_000, 4_000
"""In one window; from so many patterns is picked within a second or two."""
_MAX_NODES = 5_000
_MAX_SPLITS = 100
_SUBSIDIES = (0.05, 0.2)
"""Parts of the largest subsidy a row can have, tried when it is to be shown that no better plan overfills it."""


@dataclass(frozen=True, slots=True)
class Settled:
    """patterns: of the blocks in order. bound: no solution is below; equal to their value when they are the best."""

    patterns: list[Pattern]
    bound: float
    prices: Vector


def settle(oracle: Oracle, start: list[Pattern], prices: Vector) -> Settled:
    """The best solution of all, where the work allowed is enough for the proof; else as near as it came.

    Args: oracle: of an instance of plain blocks only. start: a solution. prices: to begin with.
    """
    exact = Oracle(oracle.instance, oracle.goal, _TOLERANCE)
    root = _part(exact, prices, list(enumerate(start)), value_of(start))
    best, window = start, _FIRST_WINDOW * abs(root.bound)
    while value_of(best) - root.bound > window:  # better plans first: they narrow all that follows
        picked = _best_within(root, window, value_of(best))
        if picked is None:
            break
        best, window = min(best, picked.patterns or best, key=value_of), window * _WIDER
    open_parts, closed = [(root.bound, 0, root)], math.inf
    for number in range(1, _MAX_SPLITS):
        if not open_parts or open_parts[0][0] >= value_of(best) * (1 - _TOLERANCE):
            break
        _, _, part = heappop(open_parts)
        picked = _best_within(part, math.inf, value_of(best))
        if picked is not None:
            best, closed = min(best, picked.patterns or best, key=value_of), min(closed, picked.bound)
            continue
        for side, half in enumerate(_halves(part, value_of(best))):
            heappush(open_parts, (half.bound, 2 * number + side, half))
    return Settled(best, min([value_of(best), closed, *(bound for bound, _, _ in open_parts)]), root.prices)


@dataclass(frozen=True, slots=True)
class _Part:
    """The solutions within the bounds of a goal on counts.

    bound: none costs less, as the prices prove. lowest: of each block at these prices. used: what the master mixes.
    """

    oracle: Oracle
    bound: float
    prices: Vector
    lowest: Sequence[float]
    columns: Sequence[tuple[int, Pattern]]
    used: Sequence[tuple[int, Pattern, float]]


@dataclass(frozen=True, slots=True)
class _Picked:
    """patterns: the best solution of those listed, if there is any. bound: no solution of the part is below."""

    patterns: list[Pattern] | None
    bound: float


def _part(oracle: Oracle, prices: Vector, first: Sequence[tuple[int, Pattern]], value: float) -> _Part:
    """Args: first: patterns to begin with. value: of the best solution known; a bound beyond it says enough.

    Raises: InfeasibleError when a block has no pattern at all.
    """
    columns = Decomposition(oracle, prices, first, overfull=value)
    used: list[tuple[int, Pattern, float]] = []
    for _ in range(_ROUNDS):
        columns.add(columns.price())
        mixed, used = columns.mix()
        if columns.bound >= value or mixed - columns.bound <= 1e-6 * abs(mixed):
            break
    answers = [oracle.cheapest(block, columns.prices) for block in oracle.instance.blocks]
    lowest = [answer[1] if answer is not None else math.inf for answer in answers]
    return _Part(oracle, columns.bound, columns.prices, lowest, columns.columns, used)


def _best_within(part: _Part, window: float, value: float) -> _Picked | None:
    """The best of the solutions whose patterns regret at most `window`, or the gap if that is less.

    None when there are too many such patterns to pick from.
    """
    window = min(window, value - part.bound)
    rows = _rows_that_matter(part, value)
    lists: list[list[Pattern]] = []
    for block, least in zip(part.oracle.instance.blocks, part.lowest, strict=True):
        patterns = patterns_within(part.oracle, block, part.prices, least + window, rows, _MAX_LABELS)
        if patterns is None or sum(map(len, lists)) + len(patterns) > _MAX_PATTERNS:
            return None
        lists.append(patterns)
    return _pick(part.oracle.instance.limits[rows], rows, lists)


def _halves(part: _Part, value: float) -> Iterator[_Part]:
    """The part split by the count of one item: the one of which most watts (or whatever costs) are in between."""
    goal, instance = part.oracle.goal, part.oracle.instance
    counts = np.zeros(len(instance.items))
    for index, pattern, share in part.used:
        block = instance.blocks[index]
        counts[block.first : block.last] += share * pattern.counts
    below = np.floor(counts + 1e-6)
    item = int(np.argmax(np.minimum(counts - below, below + 1 - counts) * goal.costs))
    uppers, lowers = goal.uppers.copy(), np.zeros_like(goal.uppers) if goal.lowers is None else goal.lowers.copy()
    uppers[item], lowers[item] = below[item], below[item] + 1
    for half in (replace(goal, uppers=uppers), replace(goal, lowers=lowers)):
        block = instance.block_of[instance.items[item].demand]
        mine = item - block.first
        known = [
            (index, pattern)
            for index, pattern in part.columns
            if instance.blocks[index] is not block
            or (half.lowers_of(block)[mine] <= pattern.counts[mine] <= half.uppers[item])
        ]
        try:
            yield _part(Oracle(instance, half, _TOLERANCE), part.prices, known, value)
        except InfeasibleError:
            continue


def _rows_that_matter(part: _Part, value: float) -> NDArray[np.int64]:
    """Rows that have a price, and those that a solution below `value` might overfill if they were left out.

    A subsidy on what a row holds lets the bound rise by its limit: above `value`, nothing better overfills the row.
    """
    instance, kept = part.oracle.instance, []
    costs = part.oracle.goal.costs + instance.use @ part.prices
    for row, limit in enumerate(instance.limits):
        users = np.flatnonzero(instance.use[:, row])
        if part.prices[row] > 0:
            kept.append(row)
        elif len(users):
            steps = instance.use[users, row]
            step = math.gcd(*steps.astype(int).tolist()) if np.all(steps == np.rint(steps)) else 0.0
            beyond = (limit // step + 1) * step if step else limit
            largest = float((costs[users] / steps).min())
            if not any(_bound_beyond(part, row, share * largest, beyond) > value for share in _SUBSIDIES):
                kept.append(row)
    return np.array(kept, dtype=np.int64)


def _bound_beyond(part: _Part, row: int, subsidy: float, beyond: float) -> float:
    """What solutions that use at least `beyond` of a row cost at least."""
    prices = part.prices.copy()
    prices[row] -= subsidy
    total = beyond * subsidy - float(part.prices @ part.oracle.instance.limits)
    for block in part.oracle.instance.blocks:
        answer = part.oracle.cheapest(block, prices)
        total += answer[1] if answer is not None else math.inf
    return total


def _pick(limits: Vector, rows: NDArray[np.int64], lists: Sequence[Sequence[Pattern]]) -> _Picked:
    """The best choice of one listed pattern per block within the rows."""
    patterns = [pattern for listed in lists for pattern in listed]
    if not all(lists):
        return _Picked(None, math.inf)
    use = np.array([pattern.use[rows] for pattern in patterns])
    entries, lower, upper = [], [], []
    for column, limit in enumerate(limits.tolist()):
        users = np.flatnonzero(use[:, column])
        entries.append((users.astype(np.int32), use[users, column]))
        lower.append(-math.inf)
        upper.append(limit)
    first = 0
    for listed in lists:
        entries.append((np.arange(first, first + len(listed), dtype=np.int32), np.ones(len(listed))))
        lower.append(1.0)
        upper.append(1.0)
        first += len(listed)
    ones = np.ones(len(patterns))
    try:
        found = solve(
            np.array([pattern.cost for pattern in patterns]),
            ones,
            build_rows(entries, np.array(lower), np.array(upper)),
            is_integer=ones.astype(np.bool_),
            gap=_TOLERANCE,
            max_nodes=_MAX_NODES,
            is_plain=True,
        )
    except InfeasibleError as error:
        return _Picked(None, math.inf if error.is_proven else -math.inf)
    chosen = np.flatnonzero(found.values > 0.5).tolist()
    return _Picked([patterns[i] for i in chosen], found.bound)
