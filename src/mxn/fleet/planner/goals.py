"""What the stages of a solution minimise: first load left unserved, tier by tier, then cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mxn.fleet.planner.blocks import Goal, Instance
from mxn.fleet.planner.linear_program import Vector
from mxn.fleet.planner.pricing import Pieces

_PIECES = 10
_STEEPER = 1.6
"""Unserved load hurts more the more of a demand is unserved already: each tenth by this factor. Where chips are scarce,
the next one therefore goes to the demand that is served worst, which is max-min fairness to within a tenth."""
_WORTH = 100.0
"""How many times its dearest way of being served a demand's load is worth when everybody is expected to be served."""
_NOTHING = 1e-4
_A_TENTH_OF_A_SLICE = 0.1
SLACK = 1e-2
"""Share of a demand's load that the cost stage may leave unserved beyond what the service stages did, if they did.
The last hundredth fills every pool to the brim; without it, 200 x 5,000 at load 2.2 draws a seventh less."""


def cost_of_serving_all(instance: Instance) -> Goal:
    """Cost, with a penalty on unserved load that no plan takes while everybody can be served."""
    pieces: list[Pieces] = []
    for demand in instance.problem.demands:
        ways = [(o.cost + o.start_cost) * max(1.0, demand.load / o.capacity) for o in demand.options if o.capacity > 0]
        pieces.append(rising(_WORTH * max(ways, default=1.0) + 1.0))
    costs = _costs(instance)
    return Goal(costs, instance.uppers, tuple(pieces))


def cost_of_serving_as_much(instance: Instance, unserved: Mapping[int, float], missing: Mapping[int, int]) -> Goal:
    """Cost of plans that leave unserved, and missing, no more than the service stages did."""
    uppers = instance.uppers.copy()
    for row, item in enumerate(instance.items):
        if item.option is None:
            uppers[row] = missing[item.demand]
    pieces = tuple(
        ((min(1.0, unserved[d] + SLACK) if unserved[d] > 0 else _NOTHING, 0.0),)
        for d in range(len(instance.problem.demands))
    )
    return Goal(_costs(instance), uppers, pieces)


def service_of_tier(instance: Instance, tier: int, unserved: Mapping[int, float], missing: Mapping[int, int]) -> Goal:
    """Unserved load of this tier, weighed by the chips it would take; what higher tiers got stays theirs."""
    pieces: list[Pieces] = []
    for index, demand in enumerate(instance.problem.demands):
        if demand.tier == tier:
            pieces.append(rising(max(float(instance.weights[index]), 1e-3)))
        else:
            pieces.append(((unserved[index], 0.0),) if demand.tier < tier else ((1.0, 0.0),))
    costs = np.zeros(len(instance.items))
    uppers = instance.uppers.copy()
    for row, item in enumerate(instance.items):
        demand = instance.problem.demands[item.demand]
        if item.option is not None:
            costs[row] = 1e-6 * item.option.slices  # between equals, the one that leaves more chips free
        elif demand.tier < tier:
            uppers[row] = missing[item.demand]
        elif demand.tier == tier:
            smallest = min((option.slices for option in demand.options), default=1)
            costs[row] = smallest * _STEEPER ** (_PIECES - 1)
    return Goal(costs, uppers, tuple(pieces), negligible=_A_TENTH_OF_A_SLICE)


def rising(weight: float) -> Pieces:
    """The penalty of unserved load; `weight` is the first slope."""
    return tuple((1 / _PIECES, weight * _STEEPER**k) for k in range(_PIECES))


def _costs(instance: Instance) -> Vector:
    """What each item's replicas cost; a missing one costs more than any that is there."""
    costs = [
        0.0 if item.option is None else item.option.cost + (0.0 if item.is_running else item.option.start_cost)
        for item in instance.items
    ]
    dearest = 10 * max(costs, default=0.0) + 1.0
    return np.array([dearest if item.option is None else c for item, c in zip(instance.items, costs, strict=True)])
