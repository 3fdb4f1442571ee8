"""What would have to give for a deployment that a plan cannot serve: the smallest change of every kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from mxn.config.deployments import DeploymentConfig
from mxn.config.model_card import ModelCard
from mxn.fleet.cells import CellFinder, Rejection, planned_context
from mxn.fleet.inventory import Inventory
from mxn.fleet.planner.problem import SLICES_PER_CHIP, Assignment, Demand, Problem
from mxn.fleet.posing import Posed

_SMALLEST_CONTEXT = 512


def relaxations(
    demand: Demand, posed: Posed, unserved: float, missing: int, inventory: Inventory, free: Mapping[str, float]
) -> tuple[str, ...]:
    """Sentences, each one change that by itself makes the deployment possible, or serves the rest of its load.

    Args: free: what the plan leaves of each pool, in slices, and of each power cap, in watts.
    """
    if demand.options:
        found = tuple(_more(demand, posed, unserved, missing, free))
        return found or ("chips in another failure domain: its rules about these leave no room in those there are",)
    deployment, card = posed.deployments[demand.name], posed.cards[demand.name]
    rejections = posed.rejections[demand.name]
    changes = [*_nearest(rejections), *_other_settings(deployment, card, inventory)]
    changes += dict.fromkeys(no.reason for no in rejections if no.constraint in ("card", "backend") and no.chips == 1)
    return tuple(changes) or ("chips of another kind: none of those here can run it",)


def left_free(problem: Problem, assignment: Assignment) -> dict[str, float]:
    """What an assignment leaves of each pool, in slices, and of each power cap, in watts."""
    caps = {pool.name: pool.power_caps for pool in problem.pools}
    free = {pool.name: float(pool.num_chips * SLICES_PER_CHIP) for pool in problem.pools}
    free |= {cap.name: cap.watts for cap in problem.caps}
    for demand in problem.demands:
        counts = assignment.replicas[demand.name]
        for option in demand.options:
            count = counts.get(option.name, 0)
            free[option.pool] -= count * option.slices
            for cap in caps[option.pool]:
                free[cap] -= count * option.watts
    return free


def _more(demand: Demand, posed: Posed, unserved: float, missing: int, free: Mapping[str, float]) -> Iterator[str]:
    """What serving the rest lacks of each kind, least first: chips, watts under budgets; and the replicas allowed."""
    if demand.max_replicas is not None and unserved:
        fastest = max(option.capacity for option in demand.options)
        needed = math.ceil(demand.load / fastest - 1e-9)
        if needed > demand.max_replicas:
            yield f"replicas.max {needed} instead of {demand.max_replicas}"
    caps = {pool.name: pool.power_caps for pool in posed.problem.pools}
    kinds: dict[str, tuple[float, float, str]] = {}
    for option in demand.options:
        cell = posed.options[demand.name][option.name].cell
        number = max(math.ceil(unserved * demand.load / option.capacity - 1e-9), missing, 1)
        watts = number * option.watts
        chips = math.ceil(max(0.0, number * option.slices - free[option.pool]) / SLICES_PER_CHIP)
        lacking = {cap: watts - free[cap] for cap in caps[option.pool] if watts > free[cap] + 1e-6}
        parts = [f"+{chips} {cell.kind}"] if chips else []
        parts += [f"+{math.ceil(lack)} W for {cap}" for cap, lack in lacking.items()]
        if chips and not lacking:
            parts.append(f"{watts:.0f} W for them")
        least = chips, max(lacking.values(), default=0.0), f"{' and '.join(parts)} ({cell.name})"
        if parts and (cell.kind not in kinds or least < kinds[cell.kind]):
            kinds[cell.kind] = least
    for _, (_, _, text) in sorted(kinds.items(), key=lambda item: (*item[1][:2], item[0])):
        yield text


def _nearest(rejections: tuple[Rejection, ...]) -> Iterator[str]:
    """The rejections that miss by least, of each constraint that has an amount."""
    for constraint in ("memory", "ttft_ms", "tpot_ms"):
        missed = [r for r in rejections if r.constraint == constraint and r.margin is not None]
        if not missed:
            continue
        least = min(missed, key=lambda r: (r.margin or 0.0, r.kind, r.backend))
        amount = f"+{least.margin:.1f} GiB" if least.unit == "GiB" else f"{constraint} {_asked(least)}"
        yield f"{amount} on {least.kind} ({least.backend} {least.quantisation} x{least.chips:g}: {least.reason})"


def _asked(rejection: Rejection) -> str:
    """The limit that would just be met."""
    return f"{math.ceil(float(rejection.reason.split(' ms')[0]) + 1):g}"


def _other_settings(deployment: DeploymentConfig, card: ModelCard, inventory: Inventory) -> Iterator[str]:
    """A format that is not allowed now, or a shorter context, that would make a cell possible."""
    finder, spec = CellFinder(inventory), card.architecture.spec()
    now = {deployment.quantisation} if deployment.quantisation != "auto" else set(deployment.quantisations or ())
    for quantisation in ("fp8", "int8", "int4") if now else ():
        if quantisation in now:
            continue
        update = {"quantisation": "auto", "quantisations": (quantisation,)}
        if any(finder.cells(deployment.model_copy(update=update), card, g).candidates for g in inventory.groups):
            yield f"quantisation {quantisation}"
            break
    if spec is None:
        return
    context = planned_context(deployment, spec)
    parts = deployment.load.parts if deployment.load else ()
    longest = max((part.prompt_tokens + part.output_tokens for part in parts), default=_SMALLEST_CONTEXT)
    while context // 2 >= longest:
        context //= 2
        shorter = deployment.model_copy(update={"context_length": context})
        if any(finder.cells(shorter, card, group).candidates for group in inventory.groups):
            yield f"context_length {context}"
            return
