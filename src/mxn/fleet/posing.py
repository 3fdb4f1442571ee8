"""Poses the planner's problem: pools and power caps out of an inventory, demands and options out of deployments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mxn.config.cluster import Objective, PolicyConfig
from mxn.config.deployments import DeploymentConfig
from mxn.config.model_card import ModelCard, find_model_card
from mxn.errors import ConfigError
from mxn.fleet.cells import Candidate, Cell, CellFinder, Rejection, load_parts, planned_context
from mxn.fleet.cost_model import card_idle_w
from mxn.fleet.inventory import ChipGroup, ChipKind, Inventory
from mxn.fleet.planner.problem import SLICES_PER_CHIP, Demand, Option, Pool, PowerCap, Problem, Relation

_LATER = 1e-3
"""Weight of each further objective of a list against the one before, both as shares of their largest value."""
_OPTIONS_PER_POOL = 8
_SITE = "site"


Running = Mapping[str, Mapping[str, int]]
"""Replicas that run: of each deployment, by option name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Posed:
    """A problem, and what its parts stand for.

    options: of each demand, by option name. rejections: per demand. groups: the chips of each pool.
    """

    problem: Problem
    options: Mapping[str, Mapping[str, Candidate]]
    rejections: Mapping[str, tuple[Rejection, ...]]
    groups: Mapping[str, ChipGroup]
    deployments: Mapping[str, DeploymentConfig]
    cards: Mapping[str, ModelCard]


def pose(
    deployments: Sequence[DeploymentConfig],
    policy: PolicyConfig,
    inventory: Inventory,
    model_cards: Mapping[str, ModelCard],
    running: Running | None = None,
) -> Posed:
    """The problem of placing these deployments on these chips. What runs and is possible no more counts as lost.

    Raises: ConfigError that names everything which cannot be planned: models without a card, lengths beyond the
        context, power budgets over chips whose watts nobody knows.
    """
    cards = _cards_of(deployments, model_cards)
    by_name = {deployment.served_name: deployment for deployment in deployments}
    is_split = any(_cares_for_domains(deployment) for deployment in deployments)
    groups = [part for group in inventory.groups for part in _split(group, is_split)]
    _check_power(inventory, policy)
    pools, pool_groups = _pools(groups, inventory)
    caps = _caps(groups, inventory)
    finder = CellFinder(inventory)
    options: dict[str, dict[str, Candidate]] = {}
    rejections: dict[str, tuple[Rejection, ...]] = {}
    demands = []
    for name, deployment in by_name.items():
        found: dict[str, Candidate] = {}
        refused: dict[Rejection, None] = {}
        ranked: list[Option] = []
        for pool in pools:
            group = replace(pool_groups[pool.name], chips_per_node=pool.chips_per_node)
            outside = _outside(deployment, group)
            if outside is not None:
                refused[outside] = None
                continue
            cells = finder.cells(deployment, cards[name], group)
            refused.update(dict.fromkeys(cells.rejections))
            here = [(_option(c, pool, deployment, policy, inventory, bool(running)), c) for c in cells.candidates]
            now = (running or {}).get(name, {})
            for option, candidate in _best(here, now):
                ranked.append(option)
                found[option.name] = candidate
        options[name], rejections[name] = found, tuple(refused)
        there = {option: count for option, count in (running or {}).get(name, {}).items() if option in found}
        demands.append(_demand(name, deployment, tuple(ranked), there))
    problem = Problem(
        pools=tuple(pools), demands=tuple(demands), caps=tuple(caps), relations=tuple(_relations(by_name))
    )
    return Posed(
        problem=problem,
        options=options,
        rejections=rejections,
        groups=pool_groups,
        deployments=by_name,
        cards=cards,
    )


def option_name(pool: str, cell: Cell) -> str:
    """What a cell in a pool is called."""
    return f"{pool} {cell.name}"


def idle_watts(kind: ChipKind) -> float | None:
    """Watts of a chip without load: its card's, or the share of its TDP that a formula assumes."""
    return card_idle_w(kind.card) if kind.card is not None and kind.card.tdp_w is not None else None


def chip_usd_per_hour(kind: ChipKind) -> float | None:
    """What a chip costs to own, else to rent; None when its card knows neither."""
    price = (kind.card.tco_usd_per_hour or kind.card.price_usd_per_hour) if kind.card else None
    return price.value if price else None


def _cards_of(deployments: Sequence[DeploymentConfig], cards: Mapping[str, ModelCard]) -> dict[str, ModelCard]:
    found, faults = {}, []
    for deployment in deployments:
        card = find_model_card(cards, deployment.model)
        spec = card.architecture.spec() if card else None
        if card is None or spec is None:
            faults.append(
                f'"{deployment.served_name}": a plan needs a model card with the architecture of "{deployment.model}"; '
                "`mxn models` lists those there are"
            )
            continue
        context = planned_context(deployment, spec)
        longest = max(part.prompt_tokens + part.output_tokens for part in load_parts(deployment))
        if longest > context:
            faults.append(f'"{deployment.served_name}": requests of {longest} tokens, its context holds {context}')
        found[deployment.served_name] = card
    if faults:
        raise ConfigError("\n".join(faults))
    return found


def _check_power(inventory: Inventory, policy: PolicyConfig) -> None:
    """A budget, or an objective in watts, over chips whose watts are unknown cannot be kept: the plan fails."""
    unknown = sorted(name for name, kind in inventory.kinds.items() if idle_watts(kind) is None)
    capped = [
        group.kind
        for group in inventory.groups
        if group.node_power_w is not None or group.rack in inventory.rack_power_w or inventory.site_power_w is not None
    ]
    faults = [
        f"a power budget covers {name}, whose watts nobody knows: give its card tdp_w, or take the budget away"
        for name in unknown
        if name in capped
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def _cares_for_domains(deployment: DeploymentConfig) -> bool:
    where = deployment.where
    return bool(where.together_with or where.apart_from or where.max_domain_share < 1 or where.survives_domain_loss)


def _split(group: ChipGroup, by_node: bool) -> list[ChipGroup]:
    """Nodes one by one where they have a budget of their own, or fail alone and somebody cares."""
    if group.num_nodes == 1 or (group.node_power_w is None and not (by_node and group.rack is None)):
        return [group]
    return [replace(group, num_nodes=1, index=index) for index in range(group.num_nodes)]


def _pools(groups: Sequence[ChipGroup], inventory: Inventory) -> tuple[list[Pool], dict[str, ChipGroup]]:
    """Pools of eight, four, two and one chips a node: whatever the sizes of replicas, they fill such nodes exactly."""
    pools, of_pool = [], {}
    for group in groups:
        eights, rest = divmod(group.chips_per_node, 8)
        chunks = [(8, eights)] if eights else []
        chunks += [(size, 1) for size in (4, 2, 1) if rest & size]
        for size, per_node in chunks:
            name = f"{group.place}/{group.kind}" + (f"/{size}" if len(chunks) > 1 else "")
            pools.append(
                Pool(
                    name=name,
                    kind=group.kind,
                    num_chips=size * per_node * group.num_nodes,
                    chips_per_node=size,
                    failure_domain=group.rack or group.place,
                    power_caps=tuple(_cap_names(group, inventory)),
                )
            )
            of_pool[name] = group
    return pools, of_pool


def _cap_names(group: ChipGroup, inventory: Inventory) -> Iterator[str]:
    if group.node_power_w is not None:
        yield f"node {group.place}"
    if group.rack in inventory.rack_power_w:
        yield f"rack {group.rack}"
    if inventory.site_power_w is not None:
        yield _SITE


def _caps(groups: Sequence[ChipGroup], inventory: Inventory) -> list[PowerCap]:
    """Budgets, less what chips draw that are on without replicas."""
    watts: dict[str, float] = {f"rack {name}": watts for name, watts in inventory.rack_power_w.items()}
    idle = dict.fromkeys(watts, 0.0)
    for group in groups:
        if group.node_power_w is not None:
            watts[f"node {group.place}"] = group.node_power_w
        if inventory.site_power_w is not None:
            watts[_SITE] = inventory.site_power_w
        for cap in _cap_names(group, inventory):
            drawn = group.num_chips * (idle_watts(inventory.kinds[group.kind]) or 0.0)
            idle[cap] = idle.get(cap, 0.0) + (drawn if inventory.unused_chips_idle else 0.0)
    faults = [
        f"the budget of {name} is {watts[name]:g} W, its chips draw {idle[name]:g} W without any load"
        for name in watts
        if idle.get(name, 0.0) > watts[name]
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return [PowerCap(name=name, watts=watts[name] - idle.get(name, 0.0)) for name in watts]


def _outside(deployment: DeploymentConfig, group: ChipGroup) -> Rejection | None:
    """Why the deployment may not be on this group's nodes, when it may not."""
    where = deployment.where
    reason = None
    if where.nodes is not None and group.node not in where.nodes:
        reason = f"node {group.node} is not among `where.nodes`"
    elif where.racks is not None and group.rack not in where.racks:
        reason = f"{f'rack {group.rack}' if group.rack else 'no rack'} is not among `where.racks`"
    if reason is None:
        return None
    return Rejection(kind=group.kind, backend="any", quantisation="any", chips=1, constraint="where", reason=reason)


def _option(
    candidate: Candidate,
    pool: Pool,
    deployment: DeploymentConfig,
    policy: PolicyConfig,
    inventory: Inventory,
    is_moving: bool,
) -> Option:
    found = candidate.prediction
    idle = found.idle_w if inventory.unused_chips_idle and found.idle_w is not None else 0.0
    cost, weight = 0.0, 1.0
    for objective in policy.objectives:
        cost += weight * _cost(objective, candidate, deployment, inventory, idle)
        weight *= _LATER
    return Option(
        name=option_name(pool.name, candidate.cell),
        pool=pool.name,
        slices=round(candidate.cell.chips * SLICES_PER_CHIP),
        capacity=found.requests_per_s,
        watts=max(0.0, (found.busy_w or 0.0) - idle),
        cost=cost,
        start_cost=cost * (policy.stability.min_gain + found.load_s / policy.stability.loading_is_spread_over_s)
        if is_moving
        else 0.0,
    )


def _cost(
    objective: Objective, candidate: Candidate, deployment: DeploymentConfig, inventory: Inventory, idle: float
) -> float:
    """What one replica costs under an objective, at the load it would have alone."""
    found, chips = candidate.prediction, candidate.cell.chips
    load = deployment.load.requests_per_s if deployment.load else 0.0
    utilisation = min(1.0, load / found.requests_per_s)
    name = candidate.cell.kind
    if objective in ("watts", "tokens_per_watt"):
        if found.busy_w is None or found.idle_w is None:
            raise ConfigError(f"the objective is {objective} and nobody knows the watts of {name}: give its card tdp_w")
        return max(0.0, found.idle_w + (found.busy_w - found.idle_w) * utilisation - idle)
    if objective == "cost":
        price = chip_usd_per_hour(inventory.kinds[name])
        if price is None:
            raise ConfigError(f"the objective is cost and the card of {name} has no price: give it tco_usd_per_hour")
        return chips * price
    if objective == "latency":
        parts = load_parts(deployment)
        output = sum(part.share * part.output_tokens for part in parts)
        return min(load, found.requests_per_s) * (found.ttft_s + output * found.tpot_s)
    return chips


def _best(found: Sequence[tuple[Option, Candidate]], running: Mapping[str, int]) -> list[tuple[Option, Candidate]]:
    """The options of one pool worth having: cheap per request, cheap for one replica, small; and those that run."""
    by_rate = sorted(found, key=lambda pair: (pair[0].cost / pair[0].capacity, pair[0].name))
    by_cost = sorted(found, key=lambda pair: (pair[0].cost, pair[0].slices, pair[0].name))
    by_room = sorted(found, key=lambda pair: (pair[0].slices / pair[0].capacity, pair[0].name))
    kept = {pair[0].name: pair for pair in found if pair[0].name in running}
    for ranked in zip(by_rate, by_cost, by_room, strict=True):
        for pair in ranked:
            if len(kept) < _OPTIONS_PER_POOL:
                kept.setdefault(pair[0].name, pair)
    return list(kept.values())


def _demand(name: str, deployment: DeploymentConfig, options: tuple[Option, ...], running: dict[str, int]) -> Demand:
    is_idle = deployment.load is None
    return Demand(
        name=name,
        load=deployment.load.requests_per_s if deployment.load else 0.0,
        options=options,
        tier=deployment.tier,
        min_replicas=max(1, deployment.replicas.min) if is_idle else deployment.replicas.min,
        max_replicas=deployment.replicas.max,
        running=running,
        max_domain_share=deployment.where.max_domain_share,
        survives_domain=deployment.where.survives_domain_loss,
    )


def _relations(deployments: Mapping[str, DeploymentConfig]) -> Iterator[Relation]:
    for name, deployment in deployments.items():
        for other in deployment.where.together_with:
            if other != name:
                yield Relation(kind="together", demands=(name, other))
        for other in deployment.where.apart_from:
            if other != name:
                yield Relation(kind="apart", demands=(name, other))
