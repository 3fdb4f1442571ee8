"""What would have to give for a deployment that a plan cannot serve: the smallest change of every kind."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mxn.config.deployments import DeploymentConfig
from mxn.config.model_card import ModelCard
from mxn.fleet.cells import CellFinder, Rejection, planned_context
from mxn.fleet.inventory import Inventory
from mxn.fleet.planner.problem import SLICES_PER_CHIP, Demand
from mxn.fleet.posing import Posed

_SMALLEST_CONTEXT = 512


def relaxations(demand: Demand, posed: Posed, unserved: float, missing: int, inventory: Inventory) -> tuple[str, ...]:
    """Sentences, each one change that by itself makes the deployment possible, or serves the rest of its load."""
    if demand.options:
        return tuple(_more(demand, posed, unserved, missing))
    deployment, card = posed.deployments[demand.name], posed.cards[demand.name]
    rejections = posed.rejections[demand.name]
    found = [*_nearest(rejections), *_other_settings(deployment, card, inventory)]
    found += dict.fromkeys(no.reason for no in rejections if no.constraint in ("card", "backend") and no.chips == 1)
    return tuple(found) or ("chips of another kind: none of those here can run it",)


def _more(demand: Demand, posed: Posed, unserved: float, missing: int) -> Iterator[str]:
    """How many more chips of each kind would serve what is left, fewest first; and the replicas allowed."""
    if demand.max_replicas is not None and unserved:
        fastest = max(option.capacity for option in demand.options)
        needed = math.ceil(demand.load / fastest - 1e-9)
        if needed > demand.max_replicas:
            yield f"replicas.max {needed} instead of {demand.max_replicas}"
    kinds: dict[str, tuple[float, float, str]] = {}
    for option in demand.options:
        candidate = posed.options[demand.name][option.name]
        number = max(math.ceil(unserved * demand.load / option.capacity - 1e-9), missing, 1)
        chips = number * option.slices / SLICES_PER_CHIP
        best = kinds.get(candidate.cell.kind)
        if best is None or chips < best[0]:
            kinds[candidate.cell.kind] = (chips, number * option.watts, candidate.cell.name)
    for kind, (chips, watts, cell) in sorted(kinds.items(), key=lambda item: (item[1][0], item[0])):
        yield f"+{math.ceil(chips)} {kind} and {watts:.0f} W for them ({cell})"


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
