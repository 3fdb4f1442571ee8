"""Dantzig-Wolfe decomposition: blocks answer prices with patterns, a master program mixes patterns and sets prices.

Only pools and power caps join the blocks, so the master has few rows, and its optimum over all patterns is far closer
to whole numbers than the problem with divisible replicas is. For any prices, the sum of the blocks' cheapest priced
patterns less the price of all there is bounds every solution from below (Lagrange): that bound is what a plan's gap is
measured against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mxn.fleet.planner.blocks import Pattern
from mxn.fleet.planner.linear_program import InfeasibleError, Master, Vector
from mxn.fleet.planner.oracle import Oracle

_SMOOTHING, _MOST_SMOOTHING = 0.7, 0.97
"""Weight of the best prices so far against the master's newest, which jump about while it has few columns. After a
round that proved nothing more the step is halved."""


class Decomposition:
    """Grows columns for one goal. `bound` never decreases; `prices` are the best so far."""

    def __init__(
        self, oracle: Oracle, prices: Vector, first: Sequence[tuple[int, Pattern]], overfull: float = math.inf
    ) -> None:
        """Args: prices: to start from, at least 0. first: patterns as (block, pattern), of every block one at least.
        overfull: what the master pays for a unit of a row beyond its limit, where `first` need not hold a solution.
        """
        instance = oracle.instance
        self.bound = -math.inf
        self.prices = prices
        self.columns: list[tuple[int, Pattern]] = []
        self._instance, self._oracle = instance, oracle
        num_shared = len(instance.limits)
        num_blocks = len(instance.blocks)
        self._master = Master(
            np.r_[np.full(num_shared, -math.inf), np.ones(num_blocks)], np.r_[instance.limits, np.ones(num_blocks)]
        )
        self._seen: set[tuple[int, bytes]] = set()
        self._next_prices, self._smoothing = prices, _SMOOTHING
        for row in range(num_shared):
            cost, upper = (0.0, 0.0) if overfull == math.inf else (overfull, math.inf)
            self._master.add_column(cost, np.array([row], dtype=np.int32), np.array([-1.0]), upper=upper)
        self.add(first)

    def add(self, patterns: Iterable[tuple[int, Pattern]]) -> None:
        """Offers patterns, as (block, pattern), to the master; those it has are left out."""
        num_shared = len(self._instance.limits)
        for block, pattern in patterns:
            key = (block, pattern.counts.tobytes())
            if key in self._seen:
                continue
            self._seen.add(key)
            self.columns.append((block, pattern))
            rows = np.flatnonzero(pattern.use)
            self._master.add_column(
                pattern.cost,
                np.r_[rows, num_shared + block].astype(np.int32),
                np.r_[pattern.use[rows], 1.0],
            )

    def price(self) -> list[tuple[int, Pattern]]:
        """One round: every block's cheapest pattern at the next prices; the bound is raised when they prove more."""
        patterns, total = [], -float(self._next_prices @ self._instance.limits)
        for index, block in enumerate(self._instance.blocks):
            answer = self._oracle.cheapest(block, self._next_prices)
            if answer is None:
                raise InfeasibleError(f"nothing fits {self._instance.problem.demands[block.demands[0]].name}")
            patterns.append((index, answer[0]))
            total += answer[1]
        if total > self.bound:
            self.bound, self.prices, self._smoothing = total, self._next_prices, _SMOOTHING
        else:
            self._smoothing = min(_MOST_SMOOTHING, (1 + self._smoothing) / 2)
        return patterns

    def hold_back(self, share: float) -> None:
        """From now on the master uses this share less of every row; what it mixes then leaves room for rounding.

        It may use more at ten times the dearest price, since patterns for so little room are still to come.
        """
        for row, limit in enumerate(self._instance.limits.tolist()):
            self._master.change_upper(row, limit * (1 - share))
            self._master.free_column(row, 10 * float(self.prices.max()) + 1e-6)

    def mix(self) -> tuple[float, list[tuple[int, Pattern, float]]]:
        """The master's optimum and the patterns it uses as (block, pattern, part); sets the next prices."""
        found = self._master.solve()
        newest = np.maximum(0.0, -found.prices[: len(self._instance.limits)])
        self._next_prices = self._smoothing * self.prices + (1 - self._smoothing) * newest
        used = [
            (block, pattern, float(part))
            for (block, pattern), part in zip(self.columns, found.values[len(self._instance.limits) :], strict=True)
            if part > 1e-7
        ]
        return found.objective, used
