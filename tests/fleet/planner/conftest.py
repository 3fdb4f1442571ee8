"""Random problems, and a check of plans that shares no code with the solver."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from mxn.fleet.planner.problem import Assignment, Demand, Option, Pool, PowerCap, Problem, Relation


def _random_problem(
    seed: int,
    *,
    num_demands: int = 12,
    scarcity: float = 1.0,
    has_caps: bool = True,
    racks: str = "ab",
    has_rules: bool = False,
) -> Problem:
    """Pools of three kinds in racks; demands with options on some of them. scarcity: above 1, chips run short.

    has_rules: some demands are spread over racks, survive the loss of one, or are kept together or apart.
    """
    dice = random.Random(seed)
    kinds = {"fast": (8, 700.0, 10.0), "lean": (4, 300.0, 4.0), "old": (2, 250.0, 1.5)}
    caps = tuple(PowerCap(name=f"rack-{rack}", watts=9000.0 / scarcity) for rack in racks)
    pools = tuple(
        Pool(
            name=f"{kind}-{rack}",
            kind=kind,
            num_chips=max(1, round(dice.randint(1, 3) * chips / scarcity)),
            chips_per_node=chips,
            failure_domain=rack,
            power_caps=(f"rack-{rack}",) if has_caps else (),
        )
        for kind, (chips, _, _) in kinds.items()
        for rack in racks
    )
    demands = []
    for index in range(num_demands):
        options = []
        for pool in pools:
            if dice.random() < 0.3:
                continue
            for slices in (4, 8, 16):
                chips, watts, rate = kinds[pool.kind]
                if slices > 8 * chips or dice.random() < 0.4:
                    continue
                share = slices / 8
                power = watts * share * dice.uniform(0.6, 1.0)
                options.append(
                    Option(
                        name=f"{pool.name}-{slices}",
                        pool=pool.name,
                        slices=slices,
                        capacity=rate * share**0.9 * dice.uniform(0.5, 1.5),
                        watts=power,
                        cost=power,
                    )
                )
        demands.append(
            Demand(
                name=f"m{index}",
                load=dice.choice([0.3, 1.0, 3.0, 12.0]) * dice.uniform(0.5, 2.0),
                options=tuple(options),
                tier=dice.randrange(3),
                min_replicas=dice.choice([0, 0, 1, 2]),
                max_replicas=dice.choice([None, None, 6]),
            )
        )
    relations: list[Relation] = []
    if has_rules:
        rules = [{}, {}, {"survives_domain": True}, {"max_domain_share": 0.5}]
        demands = [replace(demand, max_replicas=None, **dice.choice(rules)) for demand in demands]
        free = [demand.name for demand in demands if demand.max_domain_share == 1 and not demand.survives_domain]
        pairs = zip(free[::4], free[1::4], strict=False)
        relations = [Relation(kind=dice.choice(["together", "apart"]), demands=pair) for pair in pairs]
    return Problem(pools=pools, demands=tuple(demands), caps=caps if has_caps else (), relations=tuple(relations))


def _faults(problem: Problem, assignment: Assignment, unserved: Mapping[str, float] | None = None) -> list[str]:
    """Every constraint an assignment breaks, by counting; written from the problem's docstrings alone.

    unserved: what the plan says is not served; what is left must survive the loss of a domain, where asked.
    """
    faults = []
    slices = dict.fromkeys((pool.name for pool in problem.pools), 0)
    watts = dict.fromkeys((cap.name for cap in problem.caps), 0.0)
    domains: dict[str, set[str]] = {}
    pools = {pool.name: pool for pool in problem.pools}
    for demand in problem.demands:
        options = {option.name: option for option in demand.options}
        counts = assignment.replicas.get(demand.name, {})
        per_domain: dict[str, int] = {}
        capacity: dict[str, float] = {}
        for name, count in counts.items():
            option = options[name]
            if count < 1:
                faults.append(f"{demand.name}: {count} replicas of {name}")
            slices[option.pool] += option.slices * count
            for cap in pools[option.pool].power_caps:
                watts[cap] += option.watts * count
            domain = pools[option.pool].failure_domain or option.pool
            per_domain[domain] = per_domain.get(domain, 0) + count
            capacity[domain] = capacity.get(domain, 0.0) + option.capacity * count
        total = sum(counts.values())
        if demand.max_replicas is not None and total > demand.max_replicas:
            faults.append(f"{demand.name}: {total} replicas, at most {demand.max_replicas}")
        if per_domain and max(per_domain.values()) > math.ceil(demand.max_domain_share * total - 1e-9):
            faults.append(f"{demand.name}: {per_domain} of {total} replicas, share {demand.max_domain_share}")
        promised = demand.load * (1 - (unserved or {}).get(demand.name, 0.0) - 2e-4)
        left = sum(capacity.values()) - max(capacity.values(), default=0.0)
        if unserved is not None and demand.survives_domain and left < promised:
            faults.append(f"{demand.name}: {left} of {promised} requests/s without its largest domain")
        domains[demand.name] = set(per_domain)
    faults += [
        f"{pool.name}: {slices[pool.name]} slices" for pool in problem.pools if slices[pool.name] > 8 * pool.num_chips
    ]
    faults += [f"{cap.name}: {watts[cap.name]} W" for cap in problem.caps if watts[cap.name] > cap.watts + 1e-6]
    for relation in problem.relations:
        held = [domains[name] for name in relation.demands if domains[name]]
        if relation.kind == "together" and len(set().union(*held)) > 1:
            faults.append(f"together {relation.demands}: in {held}")
        if relation.kind == "apart":
            faults += [f"apart {relation.demands}" for a, b in itertools.combinations(held, 2) if a & b]
    return faults


@pytest.fixture(scope="session")
def random_problem() -> Callable[..., Problem]:
    return _random_problem


@pytest.fixture(scope="session")
def faults_of() -> Callable[..., list[str]]:
    return _faults
