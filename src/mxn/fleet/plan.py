"""A plan: what runs where, why, what was refused and why, and how far from the best possible all of it can be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mxn.config.cluster import PolicyConfig
from mxn.config.deployments import DeploymentsFile
from mxn.config.model_card import load_model_cards
from mxn.errors import ConfigError
from mxn.fleet.calibration.fitting import Calibration
from mxn.fleet.calibration.store import MeasurementStore
from mxn.fleet.cells import Candidate, Rejection
from mxn.fleet.inventory import Inventory, change_inventory, take_inventory
from mxn.fleet.planner.problem import SLICES_PER_CHIP, Demand, Option
from mxn.fleet.planner.solve import Effort, Outcome, StageReport, solve_placement
from mxn.fleet.posing import Posed, Running, chip_usd_per_hour, idle_watts, pose
from mxn.fleet.relaxations import left_free, relaxations
from mxn.fleet.seats import Seat, assign_seats

_EXACT_REPLICAS, _REFINED_DEMANDS = 40, 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Replicas of one deployment in one pool.

    pool: "node/kind". seats: each replica's node and chips. memory_gib: on each chip, KV cache of one full sequence
    included. watts: of one busy replica. calibration: where its times come from, in a sentence.
    """

    pool: str
    kind: str
    backend: str
    quantisation: str
    chips_per_replica: float
    replicas: int
    seats: tuple[str, ...]
    memory_gib: float
    memory_available_gib: float
    ttft_ms: float
    tpot_ms: float
    batch: int
    requests_per_s: float
    output_tokens_per_s: float
    watts: float | None
    tokens_per_watt: float | None
    load_s: float
    limited_by: str
    calibration: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerUp:
    """The next best way that was not taken. cost_above: as a share of the cost of the way taken, scarcity priced in."""

    cell: str
    pool: str
    cost_above: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Yield:
    """What the best cell of a chip kind yields, chosen or not: most tokens per watt, or per second without watts."""

    kind: str
    cell: str
    output_tokens_per_s: float
    watts: float | None
    tokens_per_watt: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedDeployment:
    """One deployment's part of a plan. unserved: share of its load. relaxations: what would help, smallest first.

    yields: of every chip kind that can run it.
    """

    name: str
    model: str
    tier: int
    requests_per_s: float
    placements: tuple[Placement, ...]
    unserved: float
    missing_replicas: int
    runner_up: RunnerUp | None
    yields: tuple[Yield, ...]
    rejections: tuple[Rejection, ...]
    relaxations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What one more chip of a pool, or watt under a budget, saves. amount: in the objective's unit."""

    of: str
    amount: float
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """calibration: where the figures behind the ranking come from. gap: to a proven bound, of the worst stage.

    usd_per_hour: of the chips that replicas use; None when one of them has no price. notes: what else is to be known.
    """

    calibration: str
    objective: tuple[str, ...]
    deployments: tuple[PlannedDeployment, ...]
    stages: tuple[StageReport, ...]
    gap: float
    effort: str
    watts: float | None
    chips_used: dict[str, float]
    chips_there: dict[str, int]
    prices: tuple[Price, ...] = field(default=())
    usd_per_hour: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether everybody is served and every minimum is there."""
        return not any(d.unserved or d.missing_replicas for d in self.deployments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """A plan and the problem it solves, for what goes on from a plan. replicas: of each deployment, by option name."""

    plan: Plan
    inventory: Inventory
    posed: Posed
    replicas: Mapping[str, Mapping[str, int]]


def make_plan(
    file: DeploymentsFile,
    *,
    what_if: str = "",
    effort: Effort | None = None,
    running: Running | None = None,
    store: MeasurementStore | None = None,
) -> Plan:
    """The plan alone; see `solve_plan`."""
    return solve_plan(file, what_if=what_if, effort=effort, running=running, store=store).plan


def solve_plan(
    file: DeploymentsFile,
    *,
    what_if: str = "",
    effort: Effort | None = None,
    running: Running | None = None,
    store: MeasurementStore | None = None,
) -> Solved:
    """The plan for a checked `mxn.yaml`. Computes, changes nothing.

    Args: what_if: chips to add and to take away, as in "+2 mi300x,-1 h100-sxm". effort: instead of the file's.
        running: replicas that are moved only when it is worth it. store: of measurements; the user's when left out.
    Raises: ConfigError when it cannot be planned at all.
    """
    measured = store or MeasurementStore()
    inventory = replace(
        take_inventory(file.cluster), calibration=Calibration(measured.profiles()), memory=measured.memory()
    )
    if what_if:
        inventory = change_inventory(inventory, what_if)
    limit = file.policy.limits.usd_per_hour
    solved = _solve(file, file.policy, inventory, effort, running)
    if limit is None or _keeps(solved, limit):
        return solved
    # Within the limit the objective still decides between plans that cost the same.
    rest = tuple(objective for objective in file.policy.objectives if objective != "cost")
    cheapest = _solve(file, file.policy.model_copy(update={"objective": ("cost", *rest)}), inventory, effort, running)
    if not _keeps(cheapest, limit):
        raise ConfigError(
            f"policy.limits.usd_per_hour is {limit:g}; the cheapest plan that serves as much costs "
            f"{cheapest.plan.usd_per_hour:.4g}, and the best by {', '.join(file.policy.objectives)} "
            f"{solved.plan.usd_per_hour:.4g}"
        )
    note = (
        f"the best plan by {', '.join(file.policy.objectives)} costs {solved.plan.usd_per_hour:.4g} USD/h, above the "
        f"limit of {limit:g}; this is the cheapest"
    )
    return replace(cheapest, plan=replace(cheapest.plan, notes=(*cheapest.plan.notes, note)))


def _keeps(solved: Solved, limit: float) -> bool:
    """Whether a plan keeps within a limit on its cost. Raises: ConfigError when nobody can say."""
    if solved.plan.usd_per_hour is None:
        nameless = [
            name
            for name, used in solved.plan.chips_used.items()
            if used and chip_usd_per_hour(solved.inventory.kinds[name]) is None
        ]
        raise ConfigError(
            f"policy.limits.usd_per_hour cannot be checked: the cards of {', '.join(nameless)} have no price; "
            "give them tco_usd_per_hour, or take the limit away"
        )
    return solved.plan.usd_per_hour <= limit * (1 + 1e-9)


def _solve(
    file: DeploymentsFile, policy: PolicyConfig, inventory: Inventory, effort: Effort | None, running: Running | None
) -> Solved:
    """The plan of one policy, its limits left aside."""
    posed = pose(file.deployments, policy, inventory, load_model_cards(), running)
    chosen = effort or policy.effort or _effort_for(posed)
    outcome = solve_placement(posed.problem, effort=chosen)
    seats = assign_seats(posed.problem, posed.groups, outcome.assignment)
    free = left_free(posed.problem, outcome.assignment)
    deployments = tuple(_planned(demand, posed, outcome, seats, inventory, free) for demand in posed.problem.demands)
    used: dict[str, float] = dict.fromkeys(inventory.kinds, 0.0)
    for planned in deployments:
        for placement in planned.placements:
            used[placement.kind] += placement.replicas * placement.chips_per_replica
    plan = Plan(
        calibration=_calibration(posed),
        objective=policy.objectives,
        deployments=deployments,
        stages=outcome.stages,
        gap=outcome.gap,
        effort=chosen,
        watts=_watts(posed, outcome, inventory, used),
        chips_used=used,
        chips_there={kind: inventory.num_chips(kind) for kind in inventory.kinds},
        prices=tuple(_prices(posed, outcome, policy.objectives[0])),
        usd_per_hour=_usd_per_hour(inventory, used),
    )
    return Solved(plan=plan, inventory=inventory, posed=posed, replicas=outcome.assignment.replicas)


def _usd_per_hour(inventory: Inventory, used: Mapping[str, float]) -> float | None:
    total = 0.0
    for name, count in used.items():
        price = chip_usd_per_hour(inventory.kinds[name])
        if price is None and count:
            return None
        total += count * (price or 0.0)
    return total


def _calibration(posed: Posed) -> str:
    """What the ranking rests on: every cell that was a candidate counts, chosen or not."""
    cells = {
        (posed.cards[name].name, candidate.cell.name): candidate.prediction.calibration
        for name, options in posed.options.items()
        for candidate in options.values()
    }
    kinds = list(cells.values())
    assumed = kinds.count("uncalibrated")
    if assumed == len(kinds):
        return (
            "uncalibrated: ranked on data sheets and assumed shares of their rates; figures may be off by half or more"
        )
    measured, scaled = kinds.count("measured"), kinds.count("scaled")
    counts = ", ".join(f"{count} {word}" for count, word in ((measured, "measured"), (scaled, "scaled")) if count)
    if not assumed:
        return f"calibrated: all {len(kinds)} cells are ranked on measurements ({counts})"
    return (
        f"partly uncalibrated: of {len(kinds)} cells {counts}; {assumed} are ranked on data sheets and assumed shares, "
        "and may be off by half or more beside the others"
    )


def _effort_for(posed: Posed) -> Effort:
    """Exact while that takes a moment."""
    num_options = sum(len(demand.options) for demand in posed.problem.demands)
    if num_options <= _EXACT_REPLICAS * 10:
        return "exact"
    return "refined" if len(posed.problem.demands) <= _REFINED_DEMANDS else "fast"


def _planned(
    demand: Demand,
    posed: Posed,
    outcome: Outcome,
    seats: Mapping[tuple[str, str], Sequence[Seat]],
    inventory: Inventory,
    free: Mapping[str, float],
) -> PlannedDeployment:
    name = demand.name
    deployment = posed.deployments[name]
    counts = outcome.assignment.replicas[name]
    unserved, missing = outcome.unserved.get(name, 0.0), outcome.missing.get(name, 0)
    options = {option.name: option for option in demand.options}
    placements = [_placement(options[option], posed.options[name][option], seats[name, option]) for option in counts]
    rejections = posed.rejections[name]
    return PlannedDeployment(
        name=name,
        model=deployment.model,
        tier=demand.tier,
        requests_per_s=demand.load,
        placements=tuple(sorted(placements, key=lambda p: (p.pool, p.quantisation, p.chips_per_replica))),
        unserved=unserved,
        missing_replicas=missing,
        runner_up=_runner_up(demand, counts, posed, outcome),
        yields=tuple(_yields(posed.options[name].values())),
        rejections=rejections,
        relaxations=relaxations(demand, posed, unserved, missing, inventory, free) if unserved or missing else (),
    )


def _placement(option: Option, candidate: Candidate, seats: Sequence[Seat]) -> Placement:
    cell, found, fit = candidate.cell, candidate.prediction, candidate.fit
    gib = 1 << 30
    return Placement(
        pool=option.pool,
        kind=cell.kind,
        backend=cell.backend,
        quantisation=cell.quantisation,
        chips_per_replica=cell.chips,
        replicas=len(seats),
        seats=tuple(seat.text for seat in seats),
        memory_gib=(fit.needed_bytes or 0.0) / gib,
        memory_available_gib=fit.available_bytes / gib,
        ttft_ms=1e3 * found.ttft_s,
        tpot_ms=1e3 * found.tpot_s,
        batch=found.batch,
        requests_per_s=found.requests_per_s,
        output_tokens_per_s=found.output_tokens_per_s,
        watts=found.busy_w,
        tokens_per_watt=found.tokens_per_watt,
        load_s=found.load_s,
        limited_by=found.limited_by,
        calibration=found.calibration_source,
    )


def _yields(candidates: Iterable[Candidate]) -> Iterator[Yield]:
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        known = best.get(candidate.cell.kind)
        if known is None or _rank(candidate) > _rank(known):
            best[candidate.cell.kind] = candidate
    for kind, candidate in best.items():
        found = candidate.prediction
        yield Yield(
            kind=kind,
            cell=candidate.cell.name,
            output_tokens_per_s=found.output_tokens_per_s,
            watts=found.busy_w,
            tokens_per_watt=found.tokens_per_watt,
        )


def _rank(candidate: Candidate) -> tuple[float, float, str]:
    found = candidate.prediction
    return found.tokens_per_watt or 0.0, found.output_tokens_per_s, candidate.cell.name


def _runner_up(demand: Demand, counts: dict[str, int], posed: Posed, outcome: Outcome) -> RunnerUp | None:
    """The cheapest other cell, were the whole demand served by it, at what shared chips and watts are worth."""
    caps = {pool.name: pool.power_caps for pool in posed.problem.pools}
    taken = {posed.options[demand.name][name].cell for name in counts}

    def cost(option: Option) -> float:
        each = option.cost + option.slices * outcome.prices[option.pool]
        each += option.watts * sum(outcome.prices[cap] for cap in caps[option.pool])
        number = math.ceil(demand.load / option.capacity - 1e-9) if demand.load else 1
        return each * max(number, demand.min_replicas, 1)

    others = [option for option in demand.options if posed.options[demand.name][option.name].cell not in taken]
    mine = [cost(option) for option in demand.options if option.name in counts]
    if not others or not mine:
        return None
    best = min(others, key=lambda option: (cost(option), option.name))
    above = cost(best) / min(mine) - 1 if min(mine) > 0 else 0.0
    return RunnerUp(cell=posed.options[demand.name][best.name].cell.name, pool=best.pool, cost_above=above)


def _watts(posed: Posed, outcome: Outcome, inventory: Inventory, used: dict[str, float]) -> float | None:
    """Of all replicas at their share of the load, and of idle chips where those stay on."""
    total = 0.0
    for demand in posed.problem.demands:
        counts = outcome.assignment.replicas[demand.name]
        found = [(posed.options[demand.name][name].prediction, count) for name, count in counts.items()]
        capacity = sum(prediction.requests_per_s * count for prediction, count in found)
        utilisation = min(1.0, demand.load / capacity) if capacity else 0.0
        for prediction, count in found:
            if prediction.busy_w is None or prediction.idle_w is None:
                return None
            total += count * (prediction.idle_w + (prediction.busy_w - prediction.idle_w) * utilisation)
    if inventory.unused_chips_idle:
        for name, kind in inventory.kinds.items():
            idle = idle_watts(kind)
            if idle is None:
                return None
            total += idle * max(0.0, inventory.num_chips(name) - used[name])
    return total


def _prices(posed: Posed, outcome: Outcome, objective: str) -> Sequence[Price]:
    """Shadow prices worth telling, largest first."""
    unit = {"watts": "W", "tokens_per_watt": "W", "cost": "USD/h", "latency": "s/s"}.get(objective, "chips")
    if outcome.stages[-1].name != "cost" or outcome.unserved or outcome.missing:
        return ()  # while load is unserved, what a chip brings is service, and each relaxation says how much
    pools = {pool.name for pool in posed.problem.pools}
    found = []
    for name, price in outcome.prices.items():
        amount = price * (SLICES_PER_CHIP if name in pools else 1)
        if amount > 1e-3:
            what = f"one more chip in {name}" if name in pools else f"one more watt for {name}"
            found.append(Price(of=what, amount=amount, unit=unit))
    return sorted(found, key=lambda price: (-price.amount, price.of))
