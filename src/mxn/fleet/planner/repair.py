"""Puts back what a running plan lost: what runs stays where it is, and only who is short gets new replicas.

Where those find no room, demands of lower tiers make it and are placed anew. If somebody would then be short after all,
there is no repair: everything has to be planned again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mxn.fleet.planner.blocks import Block, Goal, Instance, Pattern
from mxn.fleet.planner.linear_program import Vector
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.search import total_use

SERVED = 1e-4
"""A share of load below this counts as nothing."""


def repaired(instance: Instance, goal: Goal, prices: Vector, order: Sequence[Block]) -> list[Pattern] | None:
    """The running plan with new replicas for who is short, or None when nobody is, or that cannot be done.

    Args: order: in which blocks are placed when they compete. prices: of the shared rows, to choose new replicas by.
    """
    kept = _kept(instance)
    as_it_is = Oracle(instance, replace(goal, uppers=kept, lowers=kept))
    patterns: dict[int, Pattern] = {}
    for block in instance.blocks:
        answer = as_it_is.cheapest(block, prices)
        if answer is not None and not _lacks(instance, block, answer[0]):
            patterns[block.first] = answer[0]
    short = [block for block in order if block.first not in patterns]
    if not short:
        return None
    held = {block.first: kept[block.first : block.last] @ instance.use[block.first : block.last] for block in short}
    room = instance.limits - total_use(instance, patterns.values()) - sum(held.values(), np.zeros(len(instance.limits)))
    adding, anew = Oracle(instance, replace(goal, lowers=kept)), Oracle(instance, goal)
    donors = [block for block in reversed(order) if block.first in patterns]
    evicted: list[Block] = []
    for block in short:
        room += held[block.first]
        found = _placed(adding, block, prices, room)
        if found is None:
            lower = [donor for donor in donors if _tier(instance, donor) > _tier(instance, block)]
            given = total_use(instance, (patterns[donor.first] for donor in lower))
            found = _placed(adding, block, prices, room + given) or _placed(anew, block, prices, room + given)
            if found is None:
                return None
            for donor in lower:
                if np.any((found.use > room + 1e-6) & (patterns[donor.first].use > 0)):
                    room += patterns.pop(donor.first).use
                    donors.remove(donor)
                    evicted.append(donor)
        room -= found.use
        patterns[block.first] = found
    for block in reversed(evicted):
        found = _placed(anew, block, prices, room)
        if found is None:
            return None
        room -= found.use
        patterns[block.first] = found
    return [patterns[block.first] for block in instance.blocks]


def _kept(instance: Instance) -> NDArray[np.int64]:
    """Counts of the items that run, less those whose pool or power cap holds them no more: of lower tiers first."""
    counts = np.array([item.upper if item.is_running else 0 for item in instance.items], dtype=np.int64)
    tiers = np.array([instance.problem.demands[item.demand].tier for item in instance.items])
    for row, limit in enumerate(instance.limits):
        users = np.flatnonzero((instance.use[:, row] > 0) & (counts > 0))
        for item in users[np.lexsort((users, instance.use[users, row], -tiers[users]))]:
            over = float(counts[users] @ instance.use[users, row]) - limit
            if over <= 1e-6:
                break
            counts[item] -= min(int(counts[item]), int(np.ceil(over / instance.use[item, row] - 1e-9)))
    return counts


def _placed(oracle: Oracle, block: Block, prices: Vector, room: Vector) -> Pattern | None:
    """The block's cheapest pattern within the room that lacks nothing."""
    answer = oracle.cheapest(block, prices, room)
    return None if answer is None or _lacks(oracle.instance, block, answer[0]) else answer[0]


def _lacks(instance: Instance, block: Block, pattern: Pattern) -> bool:
    """Whether load is unserved, or replicas are missing."""
    items = instance.items[block.first : block.last]
    is_missing = any(count for item, count in zip(items, pattern.counts.tolist(), strict=True) if item.option is None)
    return is_missing or max(pattern.unserved) > SERVED


def _tier(instance: Instance, block: Block) -> int:
    return min(instance.problem.demands[index].tier for index in block.demands)
