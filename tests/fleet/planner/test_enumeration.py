from __future__ import annotations

import itertools

import numpy as np
import pytest

from mxn.fleet.planner.blocks import Instance
from mxn.fleet.planner.enumeration import patterns_within
from mxn.fleet.planner.goals import cost_of_serving_all
from mxn.fleet.planner.oracle import Oracle
from mxn.fleet.planner.pricing import penalty
from mxn.fleet.planner.problem import Demand, Option, Pool, Problem


def _problem(seed: int, fewest: int, largest: int | None) -> Problem:
    dice = np.random.default_rng(seed)
    pools = tuple(Pool(name=name, kind="k", num_chips=2) for name in "ab")
    options = tuple(
        Option(
            name=f"{pool}{n}",
            pool=pool,
            slices=int(dice.choice([4, 8])),
            capacity=float(dice.uniform(0.3, 1.5)),
            watts=1.0,
            cost=float(dice.uniform(1, 3)),
        )
        for pool in "ab"
        for n in range(2)
    )
    demand = Demand(name="m", load=2.0, options=options, min_replicas=fewest, max_replicas=largest)
    return Problem(pools=pools, demands=(demand,))


@pytest.mark.parametrize(("fewest", "largest"), [(0, None), (0, 2), (3, None), (2, 3)])
@pytest.mark.parametrize("seed", range(8))
def test_no_pattern_in_the_window_is_better_than_all_that_are_listed(
    seed: int, fewest: int, largest: int | None
) -> None:
    instance = Instance(_problem(seed, fewest, largest))
    oracle, block, prices = Oracle(instance, cost_of_serving_all(instance)), instance.blocks[0], np.array([0.05, 0.02])
    cheapest = oracle.cheapest(block, prices)
    assert cheapest is not None
    most = cheapest[1] + 4.0
    listed = patterns_within(oracle, block, prices, most, np.array([0, 1]), 10_000)
    assert listed is not None
    for counts in itertools.product(*(range(int(upper) + 1) for upper in oracle.goal.uppers)):
        number = sum(counts)
        if number < fewest or (largest is not None and number > largest):
            continue
        pattern = instance.pattern(block, np.array(counts), oracle.goal, [0.0])
        cost = pattern.cost + penalty(oracle.goal.pieces[0], max(0.0, 1.0 - float(counts @ instance.covers)))
        if cost + pattern.use @ prices <= most - 1e-6:
            assert any(p.cost <= cost + 1e-9 and np.all(p.use <= pattern.use) for p in listed)
    for pattern in listed:
        assert pattern.cost + pattern.use @ prices <= most + 1e-9


def test_more_labels_than_allowed_are_no_answer() -> None:
    instance = Instance(_problem(0, 0, None))
    oracle = Oracle(instance, cost_of_serving_all(instance))
    assert patterns_within(oracle, instance.blocks[0], np.zeros(2), 1e6, np.array([0, 1]), 1) is None
