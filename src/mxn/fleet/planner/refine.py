"""Closes the gap of a solution: columns until the master meets the bound, whole patterns, then neighbourhoods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxn.fleet.planner.blocks import Block, Pattern
from mxn.fleet.planner.decomposition import Decomposition
from mxn.fleet.planner.linear_program import InfeasibleError, Vector
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.search import place_in_order, solve_together, total_use

_ROUNDS = 12
_ATTEMPTS = 12
_FIRST_SIZE, _LAST_SIZE = 16, 64
"""Blocks solved together; more after an attempt that found nothing better."""


@dataclass(frozen=True, slots=True)
class Refined:
    """patterns: of the blocks in order. bound: no solution is below. prices: of the shared rows, which prove it."""

    patterns: list[Pattern]
    bound: float
    prices: Vector


def refine(
    oracle: Oracle, order: Sequence[Block], start: list[Pattern], prices: Vector, bound: float, target_gap: float
) -> Refined:
    """Improves `start` until it is within `target_gap` of the bound or nothing improves it.

    Args: order: in which blocks are placed when they compete. prices: to start from. bound: already proven.
    """
    columns = Decomposition(oracle.instance, oracle.goal, prices, start)
    used: list[tuple[int, Pattern, float]] = []
    for _ in range(_ROUNDS):
        columns.add(columns.price())
        mixed, used = columns.mix()
        if mixed - columns.bound <= 0.1 * target_gap * abs(mixed):
            break
    bound, best = max(bound, columns.bound), start
    rounded = _round(oracle, order, columns.prices, used)
    if rounded is not None and value_of(rounded) < value_of(best):
        best = rounded
    return Refined(_polish(oracle, columns.prices, best, bound, target_gap), bound, columns.prices)


def value_of(patterns: Sequence[Pattern]) -> float:
    """What patterns cost together."""
    return sum(pattern.cost for pattern in patterns)


def _round(
    oracle: Oracle, order: Sequence[Block], prices: Vector, used: Sequence[tuple[int, Pattern, float]]
) -> list[Pattern] | None:
    """Keeps what the master uses whole and places the rest in order."""
    blocks = oracle.instance.blocks
    leading: dict[int, tuple[float, Pattern]] = {}
    for index, pattern, part in used:
        if part > leading.get(blocks[index].first, (0.0, pattern))[0]:
            leading[blocks[index].first] = (part, pattern)
    by_need = sorted(order, key=lambda block: leading[block.first][0] < 1 - 1e-6)
    wanted = {first: pattern for first, (_, pattern) in leading.items()}
    try:
        placed = place_in_order(oracle, by_need, prices, oracle.instance.limits, wanted)
    except InfeasibleError:
        return None
    return [placed[block.first] for block in blocks]


def _polish(oracle: Oracle, prices: Vector, best: list[Pattern], bound: float, target_gap: float) -> list[Pattern]:
    """Solves together, exactly, the blocks that regret most.

    A block's regret is what its pattern costs at the prices above its cheapest one: the gap, block by block.
    """
    instance = oracle.instance
    plain = np.array([i for i, block in enumerate(instance.blocks) if block.is_plain], dtype=np.int64)
    if not len(plain) or value_of(best) - bound <= target_gap * abs(value_of(best)):
        return best
    lowest = np.array([answer[1] if (answer := oracle.cheapest(b, prices)) else 0.0 for b in instance.blocks])
    random, size = np.random.default_rng(1), _FIRST_SIZE
    for _ in range(_ATTEMPTS):
        if size > _LAST_SIZE or value_of(best) - bound <= target_gap * abs(value_of(best)):
            break
        regret = np.array([pattern.cost + float(pattern.use @ prices) for pattern in best]) - lowest
        is_tight = instance.limits - total_use(instance, best) < 0.02 * instance.limits
        competes = np.array([float(pattern.use[is_tight].sum() > 0) for pattern in best])
        score = regret / max(float(regret.max()), 1e-12) + random.random(len(best)) * (0.2 + competes)
        chosen = plain[np.argsort(-score[plain], kind="stable")[:size]].tolist()
        others = [pattern for i, pattern in enumerate(best) if i not in set(chosen)]
        room = instance.limits - total_use(instance, others)
        found, _ = solve_together(oracle, [instance.blocks[i] for i in chosen], room, [best[i] for i in chosen])
        if found is None:
            size *= 2
            continue
        best = list(best)
        for i, pattern in zip(chosen, found, strict=True):
            best[i] = pattern
    return best
