"""The planner's problem in numbers: demands, their options, and the pools and power caps they share.

Everything a chip or a model is has been boiled down before this point: an option is one way to run one replica of one
demand (chip kind, backend, quantisation, number of chips), with what it yields and what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mxn.errors import ConfigError

SLICES_PER_CHIP = 8
"""A replica takes 1/8, 1/4, 1/2 of a chip or 1, 2, 4, 8 chips, so its size in eighths divides every larger one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Equal chips that share their domains.

    failure_domain: what fails together (a rack, say). power_caps: names of the caps its watts count against.
    chips_per_node: a replica of several chips needs them in one node.
    """

    name: str
    kind: str
    num_chips: int
    chips_per_node: int = 1
    failure_domain: str = ""
    power_caps: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerCap:
    """Watts that the pools naming it may draw together."""

    name: str
    watts: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to run a replica.

    slices: eighths of a chip it takes. capacity: load it serves within the SLO, in the demand's unit (requests/s).
    watts: drawn when busy, its share of idle power included. cost: what the objective counts per replica.
    start_cost: what the objective counts on top for a replica that does not run yet.
    """

    name: str
    pool: str
    slices: int
    capacity: float
    watts: float
    cost: float
    start_cost: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """A deployment's load and what is asked of its placement.

    load: requests/s to be served. tier: 0 is served before 1, and so on.
    running: replicas that run now, by option name.
    max_domain_share: largest share of its replicas in one failure domain (1 means no limit).
    survives_domain: its load is still served when any one failure domain is lost.
    """

    name: str
    load: float
    options: tuple[Option, ...]
    tier: int = 0
    min_replicas: int = 0
    max_replicas: int | None = None
    running: dict[str, int] = field(default_factory=dict)
    max_domain_share: float = 1.0
    survives_domain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """Demands whose replicas must be in the same failure domain ("together"), or in none that another has ("apart")."""

    kind: Literal["together", "apart"]
    demands: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Everything the solver needs. Built once, checked where it is built."""

    pools: tuple[Pool, ...]
    demands: tuple[Demand, ...]
    caps: tuple[PowerCap, ...] = ()
    relations: tuple[Relation, ...] = ()

    def __post_init__(self) -> None:
        faults = list(_faults(self))
        if faults:
            raise ConfigError("\n".join(faults))


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """How many replicas of which option: demand name to option name to count; options with none are left out."""

    replicas: dict[str, dict[str, int]]

    def served_share(self, demand: Demand) -> float:
        """The part of the demand's load that its replicas can serve, 0 to 1."""
        if demand.load == 0:
            return 1.0
        by_name = {option.name: option for option in demand.options}
        counts = self.replicas.get(demand.name, {})
        return min(1.0, sum(by_name[name].capacity * count for name, count in counts.items()) / demand.load)


def _faults(problem: Problem) -> Sequence[str]:
    """Everything wrong with a problem, one line each."""
    faults = []
    pools = {pool.name: pool for pool in problem.pools}
    caps = {cap.name for cap in problem.caps}
    for names, what in (
        ([p.name for p in problem.pools], "pool"),
        ([c.name for c in problem.caps], "power cap"),
        ([d.name for d in problem.demands], "demand"),
    ):
        doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
        faults += [f'{what} "{name}" is given more than once' for name in doubled]
    for pool in problem.pools:
        if pool.num_chips < 0 or pool.chips_per_node < 1:
            faults.append(f'pool "{pool.name}": {pool.num_chips} chips with {pool.chips_per_node} a node')
        faults += [f'pool "{pool.name}": power cap "{cap}" is not known' for cap in pool.power_caps if cap not in caps]
    for cap in problem.caps:
        if not (math.isfinite(cap.watts) and cap.watts >= 0):
            faults.append(f'power cap "{cap.name}": {cap.watts} W; expected a number of at least 0')
    for demand in problem.demands:
        faults += [f'demand "{demand.name}": {fault}' for fault in _demand_faults(demand, pools)]
    known = {demand.name for demand in problem.demands}
    for relation in problem.relations:
        faults += [f'{relation.kind}: demand "{name}" is not known' for name in relation.demands if name not in known]
    return faults


def _demand_faults(demand: Demand, pools: dict[str, Pool]) -> Sequence[str]:
    faults = []
    if not (math.isfinite(demand.load) and demand.load >= 0):
        faults.append(f"load {demand.load}; expected a number of at least 0")
    if demand.min_replicas < 0 or (demand.max_replicas is not None and demand.max_replicas < demand.min_replicas):
        faults.append(f"between {demand.min_replicas} and {demand.max_replicas} replicas cannot be had")
    if not 0 < demand.max_domain_share <= 1:
        faults.append(f"max_domain_share {demand.max_domain_share}; expected more than 0 and at most 1")
    names = {option.name for option in demand.options}
    if len(names) != len(demand.options):
        faults.append("two options have the same name")
    faults += [f'runs "{name}", which is not among its options' for name in demand.running if name not in names]
    for option in demand.options:
        if option.pool not in pools:
            faults.append(f'option "{option.name}": pool "{option.pool}" is not known')
        elif option.slices > pools[option.pool].chips_per_node * SLICES_PER_CHIP:
            faults.append(f'option "{option.name}": {option.slices} slices do not fit into a node of its pool')
        if option.slices < 1 or (option.slices & (option.slices - 1)):
            faults.append(f'option "{option.name}": {option.slices} slices; expected a power of two')
        figures = (option.capacity, option.watts, option.cost, option.start_cost)
        if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
            faults.append(f'option "{option.name}": capacity, watts and costs must be numbers of at least 0')
    return faults
