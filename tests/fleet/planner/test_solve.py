from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mxn.errors import ConfigError
from mxn.fleet.planner.blocks import Instance
from mxn.fleet.planner.goals import cost_of_serving_all
from mxn.fleet.planner.problem import Demand, Option, Pool, PowerCap, Problem, Relation
from mxn.fleet.planner.relaxation import relax
from mxn.fleet.planner.solve import solve_placement


def _option(
    pool: str, *, slices: int = 8, capacity: float = 1.0, watts: float = 100.0, cost: float | None = None
) -> Option:
    name = f"{pool}-{slices}-{capacity:g}"
    return Option(
        name=name, pool=pool, slices=slices, capacity=capacity, watts=watts, cost=watts if cost is None else cost
    )


@pytest.mark.parametrize("effort", ["fast", "refined", "exact"])
@pytest.mark.parametrize("scarcity", [1.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_plan_obeys_every_constraint_and_no_stage_beats_its_bound(
    random_problem, faults_of, seed, scarcity, effort
) -> None:
    problem = random_problem(seed, scarcity=scarcity)
    outcome = solve_placement(problem, effort=effort)
    assert faults_of(problem, outcome.assignment) == []
    for stage in outcome.stages:
        assert stage.value >= stage.bound * (1 - 1e-6) - 1e-6
    for demand in problem.demands:
        total = sum(outcome.assignment.replicas[demand.name].values())
        assert total + outcome.missing.get(demand.name, 0) >= demand.min_replicas
        served = outcome.assignment.served_share(demand)
        assert 1 - served == pytest.approx(outcome.unserved.get(demand.name, 0.0), abs=2e-4)


@pytest.mark.parametrize(
    ("num_demands", "scarcity", "effort"), [(60, 0.3, "fast"), (60, 0.3, "refined"), (24, 2.0, "fast")]
)
def test_rules_about_failure_domains_hold_at_scale(random_problem, faults_of, num_demands, scarcity, effort) -> None:
    problem = random_problem(0, num_demands=num_demands, scarcity=scarcity, racks="abcdef", has_rules=True)
    assert len(problem.relations) > 2
    outcome = solve_placement(problem, effort=effort)
    assert faults_of(problem, outcome.assignment, outcome.unserved) == []
    for stage in outcome.stages:
        assert stage.value >= stage.bound * (1 - 1e-6) - 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_exact_is_proven_and_no_other_effort_is_cheaper(random_problem, seed) -> None:
    problem = random_problem(seed, num_demands=6)
    costs = {}
    for effort in ("fast", "refined", "exact"):
        outcome = solve_placement(problem, effort=effort)
        assert not outcome.unserved
        costs[effort] = outcome.stages[-1]
    assert costs["exact"].gap < 1e-6
    instance = Instance(problem)
    one_program = relax(instance, cost_of_serving_all(instance), is_integer=True)
    assert costs["exact"].value == pytest.approx(one_program.objective, rel=1e-5)
    assert costs["exact"].value <= costs["refined"].value * (1 + 1e-9)
    assert costs["refined"].value <= costs["fast"].value * (1 + 1e-9)
    assert costs["fast"].bound <= costs["exact"].value * (1 + 1e-9)


def test_the_order_of_the_input_changes_nothing_that_matters(random_problem) -> None:
    problem = random_problem(3)
    outcome = solve_placement(problem, effort="exact")
    dice = random.Random(0)
    demands = [replace(d, options=tuple(dice.sample(d.options, len(d.options)))) for d in problem.demands]
    dice.shuffle(demands)
    shuffled = replace(problem, demands=tuple(demands), pools=tuple(reversed(problem.pools)))
    other = solve_placement(shuffled, effort="exact")
    assert other.stages[-1].value == pytest.approx(outcome.stages[-1].value, rel=1e-4)
    assert solve_placement(problem, effort="exact").assignment == outcome.assignment


def test_a_lower_tier_gets_nothing_that_a_higher_one_lacks() -> None:
    pool = Pool(name="p", kind="k", num_chips=3)
    option = _option("p")
    demands = tuple(Demand(name=f"tier{t}", load=2.0, options=(option,), tier=t) for t in range(3))
    outcome = solve_placement(Problem(pools=(pool,), demands=demands))
    counts = {name: sum(c.values()) for name, c in outcome.assignment.replicas.items()}
    assert counts == {"tier0": 2, "tier1": 1, "tier2": 0}
    assert outcome.unserved == {"tier1": pytest.approx(0.5), "tier2": pytest.approx(1.0)}


def test_inside_a_tier_scarce_chips_go_to_whoever_is_served_worst() -> None:
    pool = Pool(name="p", kind="k", num_chips=6)
    demands = tuple(Demand(name=n, load=4.0, options=(_option("p"),)) for n in "abc")
    outcome = solve_placement(Problem(pools=(pool,), demands=demands))
    assert {name: sum(c.values()) for name, c in outcome.assignment.replicas.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_power_cap_moves_load_to_chips_that_draw_less() -> None:
    pools = (
        Pool(name="hot", kind="hot", num_chips=4, power_caps=("rack",)),
        Pool(name="cool", kind="cool", num_chips=4, power_caps=("rack",)),
    )
    options = (_option("hot", watts=500.0, cost=1.0), _option("cool", watts=200.0, cost=2.0))
    demand = Demand(name="m", load=4.0, options=options)
    outcome = solve_placement(
        Problem(pools=pools, demands=(demand,), caps=(PowerCap(name="rack", watts=1400.0),)), effort="exact"
    )
    assert outcome.assignment.replicas["m"] == {"hot-8-1": 2, "cool-8-1": 2}
    assert outcome.prices["rack"] > 0


def test_running_replicas_stay_when_moving_costs_more_than_it_saves() -> None:
    pools = (Pool(name="now", kind="k", num_chips=2), Pool(name="better", kind="k", num_chips=2))
    options = (_option("now", watts=110.0), _option("better", watts=100.0))
    moving = tuple(replace(option, start_cost=30.0) for option in options)
    demand = Demand(name="m", load=2.0, options=moving, running={"now-8-1": 2})
    assert solve_placement(Problem(pools=pools, demands=(demand,))).assignment.replicas["m"] == {"now-8-1": 2}
    cheap = replace(demand, options=tuple(replace(option, start_cost=5.0) for option in options))
    assert solve_placement(Problem(pools=pools, demands=(cheap,))).assignment.replicas["m"] == {"better-8-1": 2}


def test_load_survives_the_loss_of_any_failure_domain() -> None:
    pools = tuple(Pool(name=n, kind="k", num_chips=4, failure_domain=n) for n in "abc")
    options = tuple(_option(n, watts=100.0 + i) for i, n in enumerate("abc"))
    demand = Demand(name="m", load=2.0, options=options, survives_domain=True)
    counts = solve_placement(Problem(pools=pools, demands=(demand,))).assignment.replicas["m"]
    total = sum(counts.values())
    assert total == 3
    assert all(total - count >= 2 for count in counts.values())


def test_spread_holds_the_share_of_a_domain(faults_of) -> None:
    pools = tuple(Pool(name=n, kind="k", num_chips=8, failure_domain=n) for n in "ab")
    options = (_option("a", watts=50.0), _option("b", watts=100.0))
    demand = Demand(name="m", load=5.0, options=options, max_domain_share=0.5)
    problem = Problem(pools=pools, demands=(demand,))
    outcome = solve_placement(problem)
    assert faults_of(problem, outcome.assignment) == []
    assert outcome.assignment.replicas["m"] == {"a-8-1": 3, "b-8-1": 2}


def test_relations_keep_demands_together_or_apart(faults_of) -> None:
    pools = tuple(Pool(name=n, kind="k", num_chips=3, failure_domain=n) for n in "ab")
    options = (_option("a", watts=50.0), _option("b", watts=100.0))
    demands = tuple(Demand(name=n, load=1.0, options=options) for n in ("x", "y"))
    for kind, expected in (("together", 100.0), ("apart", 150.0)):
        problem = Problem(pools=pools, demands=demands, relations=(Relation(kind=kind, demands=("x", "y")),))
        outcome = solve_placement(problem)
        assert faults_of(problem, outcome.assignment) == []
        assert outcome.stages[-1].value == pytest.approx(expected, rel=1e-3)


def test_a_demand_without_options_is_unserved_and_its_minimum_missing() -> None:
    pool = Pool(name="p", kind="k", num_chips=1)
    demands = (
        Demand(name="none", load=1.0, options=(), min_replicas=2),
        Demand(name="some", load=1.0, options=(_option("p"),)),
    )
    outcome = solve_placement(Problem(pools=(pool,), demands=demands))
    assert outcome.unserved == {"none": pytest.approx(1.0)}
    assert outcome.missing == {"none": 2}


def test_every_fault_of_a_problem_is_named_at_once() -> None:
    pool = Pool(name="p", kind="k", num_chips=1, power_caps=("nowhere",))
    demand = Demand(name="m", load=float("nan"), options=(_option("q"),), min_replicas=3, max_replicas=1)
    with pytest.raises(ConfigError) as caught:
        Problem(pools=(pool,), demands=(demand, demand))
    text = str(caught.value)
    for part in ('"m" is given more than once', '"nowhere" is not known', "load nan", "between 3 and 1", 'pool "q"'):
        assert part in text
