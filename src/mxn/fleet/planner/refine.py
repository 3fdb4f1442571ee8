"""Closes the gap of a solution: columns until the master meets the bound, whole patterns, then neighbourhoods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mxn.fleet.planner.blocks import Block, Goal, Pattern
from mxn.fleet.planner.decomposition import Decomposition
from mxn.fleet.planner.linear_program import InfeasibleError, Vector
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.search import place_in_order, solve_together, total_use, value_of

_FIRST_SIZE, _LAST_SIZE = 16, 64
"""Blocks solved together; more after an attempt that found nothing better."""
_MAX_STALLS = 2
"""Attempts in a row without a gain worth a twentieth of the target, after which nothing more is tried."""

_MAX_SWEEPS = 4
_ROUNDING_NODES = 3
_ROUNDED_WELL = 0.01
_HELD_BACK, _ROUNDS_HELD_BACK = (0.0005, 0.0015, 0.005), 4
"""Shares of every row kept for rounding where whole patterns and the rest find no room together; rounds for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What refining may spend, in work rather than seconds, so that a slow machine gives the same answer.

    target_gap: good enough. rounds: of column generation. attempts: neighbourhoods solved, of `nodes` branches each;
    none: no integer programs at all.
    """

    target_gap: float
    rounds: int
    attempts: int
    nodes: int = 20


@dataclass(frozen=True, slots=True)
class Refined:
    """patterns: of the blocks in order. bound: no solution is below. prices: of the shared rows, which prove it."""

    patterns: list[Pattern]
    bound: float
    prices: Vector


def refine(
    oracle: Oracle, order: Sequence[Block], start: list[Pattern], prices: Vector, bound: float, budget: Budget
) -> Refined:
    """Improves `start` until it is within the target gap of the bound, nothing improves it or the budget is spent.

    Args: order: in which blocks are placed when they compete. prices: to start from. bound: already proven.
    """
    columns = Decomposition(oracle, prices, list(enumerate(start)))
    used: list[tuple[int, Pattern, float]] = []
    last, stalls = math.inf, 0
    for _ in range(budget.rounds):
        columns.add(columns.price())
        mixed, used = columns.mix()
        open_part = mixed - columns.bound
        if stalls == _MAX_STALLS or is_close(oracle.goal, mixed, columns.bound, 0.1 * budget.target_gap):
            break
        stalls = 0 if open_part < 0.98 * last else stalls + 1
        last = min(last, open_part)
    best = min(start, _round(oracle, order, columns.prices, used, budget) or start, key=value_of)
    if budget.attempts and not is_close(oracle.goal, value_of(best), columns.bound, _ROUNDED_WELL):
        best = min(best, _round_with_room(oracle, order, columns, budget) or best, key=value_of)
    bound, prices = max(bound, columns.bound), columns.prices
    if not budget.attempts or not all(block.is_plain for block in oracle.instance.blocks):
        best = _descend(oracle, prices, best, bound, budget)
    return Refined(_polish(oracle, prices, best, bound, budget), bound, prices)


def _round(
    oracle: Oracle, order: Sequence[Block], prices: Vector, used: Sequence[tuple[int, Pattern, float]], budget: Budget
) -> list[Pattern] | None:
    """Keeps what the master uses whole and solves the rest together, or one after another where that fails.

    The master has few rows, so it mixes patterns for as few blocks.
    """
    blocks, limits = oracle.instance.blocks, oracle.instance.limits
    leading: dict[int, tuple[float, Pattern]] = {}
    for index, pattern, part in used:
        if part > leading.get(index, (0.0, pattern))[0]:
            leading[index] = (part, pattern)
    split = sorted(i for i, (part, _) in leading.items() if part < 1 - 1e-6)
    kept = {i: pattern for i, (_, pattern) in leading.items() if i not in set(split)}
    room = limits - total_use(oracle.instance, kept.values())
    if budget.attempts and split and all(block.is_plain for block in blocks) and np.all(room >= -1e-6):
        found, _ = solve_together(oracle, [blocks[i] for i in split], room, None, gap=1e-3, max_nodes=_ROUNDING_NODES)
        if found is not None:
            patterns = kept | dict(zip(split, found, strict=True))
            return [patterns[i] for i in range(len(blocks))]
    is_split = {blocks[i].first for i in split}
    by_need = sorted(order, key=lambda block: block.first in is_split)
    wanted = {blocks[i].first: pattern for i, (_, pattern) in leading.items()}
    try:
        placed = place_in_order(oracle, by_need, prices, limits, wanted)
    except InfeasibleError:
        return None
    return [placed[block.first] for block in blocks]


def _round_with_room(
    oracle: Oracle, order: Sequence[Block], columns: Decomposition, budget: Budget
) -> list[Pattern] | None:
    """Rounds what the master mixes when it holds a little of every row back, and more where that is not enough."""
    in_order = replace(budget, attempts=0)
    for share in _HELD_BACK:
        columns.hold_back(share)
        try:
            _, used = columns.mix()
            for _ in range(_ROUNDS_HELD_BACK):
                columns.add(columns.price())
                _, used = columns.mix()
        except InfeasibleError:
            return None
        rounded = _round(oracle, order, columns.prices, used, in_order)
        if rounded is not None:
            return rounded
    return None


def _descend(oracle: Oracle, prices: Vector, best: list[Pattern], bound: float, budget: Budget) -> list[Pattern]:
    """Takes blocks out one at a time and puts each back as cheaply as the room allows, until that gains little.

    Sweeps count scarce chips at their prices and at nothing in turn: the first makes room, the second uses it.
    """
    instance, free = oracle.instance, np.zeros_like(prices)
    now, room = list(best), instance.limits - total_use(instance, best)
    for sweep in range(_MAX_SWEEPS):
        if is_close(oracle.goal, value_of(best), bound, budget.target_gap):
            break
        before, at = value_of(best), free if sweep % 2 else prices
        for i in sorted(range(len(now)), key=lambda i: -now[i].cost):
            old = now[i]
            answer = oracle.cheapest(instance.blocks[i], at, room + old.use, is_quick=True)
            if answer is None:
                continue
            new = answer[0]
            if new.cost + float(new.use @ at) < old.cost + float(old.use @ at) - 1e-9 * abs(old.cost):
                now[i] = new
                room += old.use - new.use
        if value_of(now) < value_of(best):
            best = list(now)
        if sweep % 2 and before - value_of(best) < 0.05 * budget.target_gap * before:
            break
    return best


def _polish(oracle: Oracle, prices: Vector, best: list[Pattern], bound: float, budget: Budget) -> list[Pattern]:
    """Solves together, exactly, the blocks that regret most.

    A block's regret is what its pattern costs at the prices above its cheapest one: the gap, block by block.
    """
    instance = oracle.instance
    plain = np.array([i for i, block in enumerate(instance.blocks) if block.is_plain], dtype=np.int64)
    if not len(plain) or not budget.attempts or is_close(oracle.goal, value_of(best), bound, budget.target_gap):
        return best
    lowest = np.array([answer[1] if (answer := oracle.cheapest(b, prices)) else 0.0 for b in instance.blocks])
    random, size, stalls = np.random.default_rng(1), _FIRST_SIZE, 0
    for _ in range(budget.attempts):
        if stalls == _MAX_STALLS or is_close(oracle.goal, value_of(best), bound, budget.target_gap):
            break
        regret = np.array([pattern.cost + float(pattern.use @ prices) for pattern in best]) - lowest
        is_tight = instance.limits - total_use(instance, best) < 0.02 * instance.limits
        competes = np.array([float(pattern.use[is_tight].sum() > 0) for pattern in best])
        score = regret / max(float(regret.max()), 1e-12) + random.random(len(best)) * (0.2 + competes)
        chosen = plain[np.argsort(-score[plain], kind="stable")[:size]].tolist()
        inside, before = set(chosen), value_of(best)
        room = instance.limits - total_use(instance, [p for i, p in enumerate(best) if i not in inside])
        blocks = [instance.blocks[i] for i in chosen]
        found, _ = solve_together(oracle, blocks, room, [best[i] for i in chosen], max_nodes=budget.nodes)
        if found is not None:
            best = list(best)
            for i, pattern in zip(chosen, found, strict=True):
                best[i] = pattern
        if before - value_of(best) > 0.05 * budget.target_gap * before:
            stalls = 0
        else:
            stalls, size = stalls + 1, min(2 * size, _LAST_SIZE)
    return best


def is_close(goal: Goal, value: float, bound: float, target_gap: float) -> bool:
    """Whether a value is within the target gap of its bound, or as good as on it."""
    return value - bound <= max(goal.negligible, target_gap * abs(value))
