"""Solves a placement problem in stages: who is served, tier by tier, then at what cost; each with a proven gap.

fast: prices from the relaxation, one pricing round for the bound, blocks placed one after another; where that leaves
a gap above 5 %, as when chips are scarce, a few rounds of columns.
refined: columns are generated until the bound meets the master, then neighbourhoods are solved exactly.
exact: all patterns that a better plan could hold are listed and picked from; refined where that is too much.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mxn.fleet.planner.blocks import Block, Goal, Instance, Pattern
from mxn.fleet.planner.exact import settle
from mxn.fleet.planner.goals import cost_of_serving_all, cost_of_serving_as_much, service_of_tier
from mxn.fleet.planner.linear_program import InfeasibleError, Solution, Vector
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.problem import Assignment, Problem
from mxn.fleet.planner.refine import Budget, is_close, refine
from mxn.fleet.planner.relaxation import relax
from mxn.fleet.planner.repair import SERVED, repaired
from mxn.fleet.planner.search import place_in_order, restated, value_of

Effort = Literal["fast", "refined", "exact"]

_BUDGETS: dict[Effort, Budget] = {
    "fast": Budget(target_gap=0.05, rounds=4, attempts=0),
    "refined": Budget(target_gap=1e-3, rounds=20, attempts=8),
    "exact": Budget(target_gap=1e-3, rounds=20, attempts=8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """What one stage found.

    value: of what it minimises. bound: proven, no plan is below it. gap: their difference as a share of the value.
    """

    name: str
    value: float
    bound: float
    gap: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A plan in numbers.

    unserved: share of a demand's load that no replica serves, where there is any. missing: replicas short of the
    minimum. stages: in the order solved; one stage "cost" where everybody is served.
    prices: what one more slice of a pool, or watt under a cap, would save.
    """

    assignment: Assignment
    unserved: dict[str, float]
    missing: dict[str, int]
    stages: tuple[StageReport, ...]
    prices: dict[str, float]

    @property
    def gap(self) -> float:
        """The largest gap of any stage."""
        return max(stage.gap for stage in self.stages)


def solve_placement(problem: Problem, *, effort: Effort = "refined") -> Outcome:
    """Places all demands. The same problem gives the same answer.

    Raises: InfeasibleError when relations or rules about failure domains cannot be kept at all.
    """
    return _Solver(problem, effort).run()


class _Solver:
    def __init__(self, problem: Problem, effort: Effort) -> None:
        self.problem, self.instance, self.effort = problem, Instance(problem), effort
        self.stages: list[StageReport] = []
        self.prices = np.zeros(len(self.instance.limits))
        self.order = sorted(self.instance.blocks, key=self._rank)
        self.is_missing = np.array([item.option is None for item in self.instance.items], dtype=np.bool_)

    def run(self) -> Outcome:
        goal = cost_of_serving_all(self.instance)
        relaxed = relax(self.instance, goal)
        patterns = None
        if not self._is_short(relaxed):
            patterns = self._repair(goal, relaxed) or self._minimise("cost", goal, None, relaxed)
        if patterns is None or any(self._unserved(patterns).values()) or any(self._missing(patterns).values()):
            self.stages.clear()
            patterns = self._serve_tier_by_tier(patterns)
        names = [demand.name for demand in self.problem.demands]
        return Outcome(
            assignment=self.instance.assignment(patterns),
            unserved={names[d]: share for d, share in self._unserved(patterns).items() if share > 0},
            missing={names[d]: count for d, count in self._missing(patterns).items() if count},
            stages=tuple(self.stages),
            prices=dict(zip(self.instance.row_names, self.prices.tolist(), strict=True)),
        )

    def _repair(self, goal: Goal, relaxed: Solution) -> list[Pattern] | None:
        """What runs, with new replicas for who is short; None when nobody is or that is not enough."""
        if not any(demand.running for demand in self.problem.demands):
            return None
        began_s = time.perf_counter()
        prices = self._prices_of(relaxed)
        patterns = repaired(self.instance, goal, prices, self.order)
        if patterns is not None:
            _, bound = self._bound(Oracle(self.instance, goal), prices)
            self._report("cost", patterns, bound, prices, began_s, goal)
        return patterns

    def _serve_tier_by_tier(self, patterns: list[Pattern] | None) -> list[Pattern]:
        """Service first, tier after tier, then cost among all plans that serve as much."""
        unserved: dict[int, float] = {}
        missing: dict[int, int] = {}
        for tier in sorted({demand.tier for demand in self.problem.demands}):
            goal = service_of_tier(self.instance, tier, unserved, missing)
            patterns = self._minimise(f"service of tier {tier}", goal, patterns)
            unserved |= {d: u for d, u in self._unserved(patterns).items() if self.problem.demands[d].tier == tier}
            missing |= {d: m for d, m in self._missing(patterns).items() if self.problem.demands[d].tier == tier}
        if not any(unserved.values()) and not any(missing.values()):
            self.stages.clear()  # there is room for everybody after all: nothing was to be divided
            return self._minimise("cost", cost_of_serving_all(self.instance), patterns)
        return self._minimise("cost", cost_of_serving_as_much(self.instance, unserved, missing), patterns)

    def _minimise(
        self, name: str, goal: Goal, start: list[Pattern] | None, relaxed: Solution | None = None
    ) -> list[Pattern]:
        """One stage. start: a solution found for another goal. relaxed: what `relax` found, when known already."""
        began_s = time.perf_counter()
        oracle, blocks = Oracle(self.instance, goal), self.instance.blocks
        prices = self._prices_of(relaxed or relax(self.instance, goal))
        cheapest, bound = self._bound(oracle, prices)
        best = restated(self.instance, goal, start) if start is not None else None
        if best is not None and not np.isfinite(value_of(best)):
            best = None
        try:
            placed = place_in_order(oracle, self.order, prices, self.instance.limits, cheapest)
            found = [placed[block.first] for block in blocks]
            best = found if best is None or value_of(found) < value_of(best) else best
        except InfeasibleError:
            if best is None:
                raise
        if self.effort == "exact" and all(block.is_plain for block in blocks):
            settled = settle(oracle, best, prices)
            best, bound, prices = settled.patterns, max(bound, settled.bound), settled.prices
        budget = _BUDGETS[self.effort]
        if not is_close(goal, value_of(best), bound, budget.target_gap):
            refined = refine(oracle, self.order, best, prices, bound, budget)
            best, bound, prices = refined.patterns, max(bound, refined.bound), refined.prices
        self._report(name, best, bound, prices, began_s, goal)
        return best

    def _report(
        self, name: str, patterns: list[Pattern], bound: float, prices: Vector, began_s: float, goal: Goal
    ) -> None:
        """Notes what a stage found; the last one's prices are the plan's."""
        value, bound, self.prices = value_of(patterns), max(0.0, bound), prices  # nothing costs less than nothing
        gap = 0.0 if is_close(goal, value, bound, 0.0) else (value - bound) / value
        self.stages.append(
            StageReport(name=name, value=value, bound=bound, gap=gap, seconds=time.perf_counter() - began_s)
        )

    # ------------------------------------------------------------------ helpers

    def _prices_of(self, relaxed: Solution) -> Vector:
        return np.maximum(0.0, -relaxed.prices[: len(self.instance.limits)])

    def _bound(self, oracle: Oracle, prices: Vector) -> tuple[dict[int, Pattern], float]:
        """Every block's cheapest pattern at these prices, by its first item, and the bound that they prove."""
        cheapest, total = {}, -float(prices @ self.instance.limits)
        for block in self.instance.blocks:
            answer = oracle.cheapest(block, prices)
            if answer is None:
                names = ", ".join(self.problem.demands[d].name for d in block.demands)
                raise InfeasibleError(f"no mix of options gives {names} what they must have")
            cheapest[block.first] = answer[0]
            total += answer[1]
        return cheapest, total

    def _rank(self, block: Block) -> tuple[int, int, float, int]:
        """Blocks of higher tiers, then those with the least choice, then the largest, are placed first."""
        items = self.instance.items[block.first : block.last]
        pools = {item.option.pool for item in items if item.option is not None}
        weight = sum(float(self.instance.weights[d]) for d in block.demands)
        return min(self.problem.demands[d].tier for d in block.demands), len(pools), -weight, block.first

    def _is_short(self, relaxed: Solution) -> bool:
        """Whether even divisible replicas leave load unserved or replicas missing."""
        items, pieces = np.split(relaxed.values, [len(self.is_missing)])
        return bool(pieces.max(initial=0.0) > SERVED or items[self.is_missing].max(initial=0.0) > SERVED)

    def _unserved(self, patterns: Sequence[Pattern]) -> dict[int, float]:
        return {
            d: share if share > SERVED else 0.0
            for block, pattern in zip(self.instance.blocks, patterns, strict=True)
            for d, share in zip(block.demands, pattern.unserved, strict=True)
        }

    def _missing(self, patterns: Sequence[Pattern]) -> dict[int, int]:
        missing = dict.fromkeys(range(len(self.problem.demands)), 0)
        for block, pattern in zip(self.instance.blocks, patterns, strict=True):
            for row in np.flatnonzero(self.is_missing[block.first : block.last]):
                missing[self.instance.items[block.first + row].demand] += int(pattern.counts[row])
        return missing
