from __future__ import annotations

from dataclasses import replace

import pytest

from mxn.fleet.planner.problem import Demand, Option, Pool, Problem, Relation
from mxn.fleet.planner.solve import solve_placement


def _options(*pools: str, cost: float = 100.0) -> tuple[Option, ...]:
    return tuple(
        Option(name=f"on-{pool}", pool=pool, slices=8, capacity=1.0, watts=100.0, cost=cost + i, start_cost=50.0)
        for i, pool in enumerate(pools)
    )


def _running(problem: Problem, replicas: dict[str, dict[str, int]]) -> Problem:
    return replace(problem, demands=tuple(replace(d, running=replicas[d.name]) for d in problem.demands))


def _stopped(problem: Problem, replicas: dict[str, dict[str, int]]) -> dict[str, int]:
    """Replicas that run and are not in the plan, by demand."""
    gone = {
        d.name: sum(max(0, count - replicas[d.name].get(name, 0)) for name, count in d.running.items())
        for d in problem.demands
    }
    return {name: count for name, count in gone.items() if count}


@pytest.mark.parametrize("seed", range(6))
def test_what_did_not_lose_its_chips_stays(random_problem, faults_of, seed) -> None:
    problem = random_problem(seed, has_caps=False)
    roomy = replace(problem, pools=tuple(replace(p, num_chips=2 * p.num_chips) for p in problem.pools))
    before = solve_placement(roomy).assignment
    lost = next(option for d in roomy.demands for option in before.replicas[d.name])
    survivors = {
        name: {o: count - (o == lost) for o, count in counts.items() if count - (o == lost)}
        for name, counts in before.replicas.items()
    }
    changed = _running(roomy, survivors)
    after = solve_placement(changed)
    assert faults_of(changed, after.assignment) == []
    assert not after.unserved
    assert not after.missing
    assert _stopped(changed, after.assignment.replicas) == {}
    assert after.stages[-1].value >= after.stages[-1].bound


def test_a_lower_tier_makes_room_and_moves_elsewhere() -> None:
    pools = (Pool(name="a", kind="k", num_chips=2), Pool(name="b", kind="k", num_chips=2))
    demands = (
        Demand(name="first", load=2.0, options=_options("a"), tier=0, running={"on-a": 1}),
        Demand(name="second", load=1.0, options=_options("a", "b"), tier=1, running={"on-a": 1}),
        Demand(name="other", load=1.0, options=_options("b"), tier=1, running={"on-b": 1}),
    )
    problem = Problem(pools=pools, demands=demands)
    after = solve_placement(problem)
    assert after.assignment.replicas == {"first": {"on-a": 2}, "second": {"on-b": 1}, "other": {"on-b": 1}}
    assert _stopped(problem, after.assignment.replicas) == {"second": 1}


def test_what_a_shrunken_pool_holds_no_more_is_taken_from_the_lowest_tier() -> None:
    pools = (Pool(name="a", kind="k", num_chips=2), Pool(name="b", kind="k", num_chips=2))
    demands = tuple(
        Demand(name=f"tier{t}", load=1.0, options=_options("a", "b"), tier=t, running={"on-a": 1}) for t in range(3)
    )
    after = solve_placement(Problem(pools=pools, demands=demands))
    assert after.assignment.replicas == {"tier0": {"on-a": 1}, "tier1": {"on-a": 1}, "tier2": {"on-b": 1}}


def test_everything_is_planned_again_where_what_runs_leaves_no_room() -> None:
    pools = (Pool(name="a", kind="k", num_chips=1), Pool(name="b", kind="k", num_chips=1))
    demands = (
        Demand(name="choosy", load=1.0, options=_options("a")),
        Demand(name="easy", load=1.0, options=_options("a", "b"), running={"on-a": 1}),
    )
    after = solve_placement(Problem(pools=pools, demands=demands))
    assert not after.unserved
    assert after.assignment.replicas == {"choosy": {"on-a": 1}, "easy": {"on-b": 1}}


def test_relations_hold_for_new_replicas(faults_of) -> None:
    pools = tuple(Pool(name=n, kind="k", num_chips=2, failure_domain=n) for n in "ab")
    demands = (
        Demand(name="x", load=1.0, options=_options("a", "b"), running={"on-b": 1}),
        Demand(name="y", load=1.0, options=_options("a", "b")),
    )
    for kind, expected in (("together", "on-b"), ("apart", "on-a")):
        problem = Problem(pools=pools, demands=demands, relations=(Relation(kind=kind, demands=("x", "y")),))
        after = solve_placement(problem)
        assert faults_of(problem, after.assignment) == []
        assert after.assignment.replicas == {"x": {"on-b": 1}, "y": {expected: 1}}
