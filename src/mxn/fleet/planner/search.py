"""Finds whole solutions: blocks placed one after another at given prices, and neighbourhoods solved again exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mxn.fleet.planner.blocks import Block, Goal, Instance, Pattern
from mxn.fleet.planner.linear_program import InfeasibleError, Vector, build_rows, solve
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.pricing import penalty


def place_in_order(
    oracle: Oracle, order: Iterable[Block], prices: Vector, room: Vector, wanted: dict[int, Pattern] | None = None
) -> dict[int, Pattern]:
    """Gives every block, in turn, its cheapest pattern among those that still fit.

    Args: wanted: patterns to take where they fit, by the block's first item. Returns: patterns by the same key.
    Raises: InfeasibleError when a block finds no room.
    """
    placed, room = {}, room.copy()
    for block in order:
        pattern = (wanted or {}).get(block.first)
        if pattern is None or np.any(pattern.use > room + 1e-6):
            answer = oracle.cheapest(block, prices, room)
            if answer is None:
                raise InfeasibleError(_no_room(oracle.instance, block))
            pattern = answer[0]
        placed[block.first] = pattern
        room -= pattern.use
    return placed


def solve_together(
    oracle: Oracle,
    blocks: Sequence[Block],
    room: Vector,
    current: Sequence[Pattern] | None,
    *,
    gap: float = 1e-4,
    max_nodes: int = 200,
) -> tuple[list[Pattern] | None, float]:
    """Plain blocks solved as one integer program within `room`, begun from their current patterns if they have any.

    Returns: better patterns, or None when none were found; and a proven bound on what these blocks cost together.
    """
    instance, goal = oracle.instance, oracle.goal
    items = np.concatenate([np.arange(block.first, block.last) for block in blocks])
    column_of = {int(item): column for column, item in enumerate(items)}
    cost, upper = list(goal.costs[items]), [float(u) for u in goal.uppers[items]]
    start = [] if current is None else list(np.concatenate([p.counts for p in current]).astype(float))
    use = instance.use[items]
    entries, lower, high = [], [], []
    for row in np.flatnonzero(use.any(axis=0)):
        columns = np.flatnonzero(use[:, row])
        entries.append((columns.astype(np.int32), use[columns, row]))
        lower.append(-np.inf)
        high.append(float(room[row]))
    for place, block in enumerate(blocks):
        (index,) = block.demands
        demand = instance.problem.demands[index]
        mine = np.array([column_of[i] for i in range(block.first, block.last)], dtype=np.int32)
        if demand.load > 0:
            pieces = range(len(cost), len(cost) + len(goal.pieces[index]))
            left = 0.0 if current is None else current[place].unserved[0]
            for length, slope in goal.pieces[index]:
                cost.append(slope)
                upper.append(length)
                start.append(min(length, left))
                left -= start[-1]
            columns = np.r_[mine, np.array(pieces, dtype=np.int32)].astype(np.int32)
            entries.append((columns, np.r_[instance.covers[block.first : block.last], np.ones(len(pieces))]))
            lower.append(1.0)
            high.append(np.inf)
        if demand.min_replicas or demand.max_replicas is not None:
            entries.append((mine, np.ones(len(mine))))
            lower.append(float(demand.min_replicas))
            high.append(np.inf if demand.max_replicas is None else float(demand.max_replicas))
    is_integer = np.zeros(len(cost), dtype=np.bool_)
    is_integer[: len(items)] = True
    try:
        found = solve(
            np.array(cost),
            np.array(upper),
            build_rows(entries, np.array(lower), np.array(high)),
            is_integer=is_integer,
            start=None if current is None else np.array(start),
            gap=gap,
            max_nodes=max_nodes,
        )
    except InfeasibleError:
        return None, -np.inf
    if current is not None and found.objective >= sum(pattern.cost for pattern in current) * (1 - 1e-9):
        return None, found.bound
    better = [
        _pattern(oracle, block, found.values[[column_of[i] for i in range(block.first, block.last)]])
        for block in blocks
    ]
    return better, found.bound


def _pattern(oracle: Oracle, block: Block, values: Vector) -> Pattern:
    instance, goal, index = oracle.instance, oracle.goal, block.demands[0]
    counts = np.rint(values).astype(np.int64)
    covered = float(counts @ instance.covers[block.first : block.last])
    unserved = 0.0 if instance.problem.demands[index].load == 0 else max(0.0, 1.0 - covered)
    unserved = 0.0 if unserved < 1e-9 else unserved
    pattern = instance.pattern(block, counts, goal, [unserved])
    return Pattern(counts, pattern.unserved, pattern.cost + penalty(goal.pieces[index], unserved), pattern.use)


def _no_room(instance: Instance, block: Block) -> str:
    names = ", ".join(instance.problem.demands[index].name for index in block.demands)
    return f"no room is left for what {names} must have"


def total_use(instance: Instance, patterns: Iterable[Pattern]) -> Vector:
    """What patterns use of each shared row together."""
    total = np.zeros(len(instance.limits))
    for pattern in patterns:
        total += pattern.use
    return total


def value_of(patterns: Sequence[Pattern]) -> float:
    """What patterns cost together."""
    return sum(pattern.cost for pattern in patterns)


def restated(instance: Instance, goal: Goal, patterns: Sequence[Pattern]) -> list[Pattern]:
    """The same patterns with their cost under another goal."""
    again = []
    for block, pattern in zip(instance.blocks, patterns, strict=True):
        priced = instance.pattern(block, pattern.counts, goal, pattern.unserved)
        extra = sum(penalty(goal.pieces[d], u) for d, u in zip(block.demands, pattern.unserved, strict=True))
        again.append(Pattern(priced.counts, priced.unserved, priced.cost + extra, priced.use))
    return again
