"""From `mxn.yaml` and the nodes of a Ray cluster to the replicas that Serve is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mxn.backends.registry import load_backend
from mxn.config.chip_card import ChipCard, load_chip_cards
from mxn.config.deployments import DeploymentConfig, DeploymentsFile
from mxn.config.ray import BackendEnvironment
from mxn.core.model import Model
from mxn.errors import BackendError
from mxn.fleet.choice import candidates, refusal_of
from mxn.fleet.launchers.ray.group import ReplicaGroup
from mxn.fleet.plan import Placement, PlannedDeployment, make_plan
from mxn.fleet.ray_inventory import NODE_LABEL, RACK_LABEL, NodeReport, OfferedKind, offered_kinds, planned_nodes

_PARTS_OF_A_CHIP = 8


def groups_of(
    file: DeploymentsFile, reports: Sequence[NodeReport], fetch: Callable[[str], Model]
) -> tuple[list[ReplicaGroup], dict[str, str]]:
    """The groups, and by deployment the reason why it has fewer replicas than it should.

    The planner decides when a deployment says its load; otherwise each gets its fewest replicas on the first chips
    whose backend runs it. fetch: makes a model's facts known.
    """
    cards = {**load_chip_cards(), **{card.id: card for card in file.cluster.chips}}
    kinds = _kinds(reports, cards)
    if any(deployment.load is not None for deployment in file.deployments):
        return _planned_groups(file, reports, cards, kinds)
    groups: list[ReplicaGroup] = []
    shortfalls = {}
    for deployment in file.deployments:
        try:
            groups.append(_first_group(file, deployment, fetch(deployment.model), kinds, groups))
        except BackendError as error:
            shortfalls[deployment.served_name] = str(error)
    return [_with_part(group, groups, kinds[group.kind], file) for group in groups], shortfalls


def _kinds(reports: Sequence[NodeReport], cards: Mapping[str, ChipCard]) -> dict[str, OfferedKind]:
    """Every kind once, counted over all nodes. What reaches it is what reaches it everywhere."""
    kinds: dict[str, OfferedKind] = {}
    for report in reports:
        for found in offered_kinds(report, cards):
            known = kinds.get(found.kind)
            if known is None:
                kinds[found.kind] = found
                continue
            kinds[found.kind] = OfferedKind(
                kind=found.kind,
                count=known.count + found.count,
                chip=known.chip,
                names=tuple(sorted({*known.names, *found.names})),
                backends=tuple(name for name in known.backends if name in found.backends),
                uses_ray_gpus=known.uses_ray_gpus or found.uses_ray_gpus,
            )
    return dict(sorted(kinds.items()))  # nodes come in any order


def _first_group(
    file: DeploymentsFile,
    deployment: DeploymentConfig,
    model: Model,
    kinds: Mapping[str, OfferedKind],
    others: Sequence[ReplicaGroup],
) -> ReplicaGroup:
    """On the emptiest kind of chip that the first backend that will do runs it on. Raises: BackendError."""
    refusals = []
    settings = deployment.load_settings()
    for name in candidates(deployment.backend):
        found = []
        for kind in kinds.values():
            if not _is_allowed(deployment, kind.kind):
                refusals.append(f"{kind.kind}: `where` leaves this kind out")
            elif name not in kind.backends:
                refusals.append(f"{kind.kind}: {name} is not there, only {', '.join(kind.backends)}")
            elif (refusal := refusal_of(load_backend(name), kind.chip, model.spec, settings)) is not None:
                refusals.append(f"{kind.kind}: {name} {refusal}")
            else:
                found.append(kind)
        if found:
            best = min(found, key=lambda kind: _num_replicas(others, kind.kind) / max(1, kind.count))
            return _group(file, deployment, best, name, replicas=max(1, deployment.replicas.min))
    reasons = "; ".join(dict.fromkeys(refusals)) or "no node offers a chip as a resource"
    raise BackendError(f"no chip of the cluster can run {deployment.served_name}: {reasons}")


def _num_replicas(groups: Sequence[ReplicaGroup], kind: str) -> int:
    return sum(group.max_replicas for group in groups if group.kind == kind)


def _with_part(
    group: ReplicaGroup, groups: Sequence[ReplicaGroup], kind: OfferedKind, file: DeploymentsFile
) -> ReplicaGroup:
    """The group on the part of a chip that its deployment asks for, or on an even one where chips are too few."""
    [asked] = [d.chip_share for d in file.deployments if d.served_name == group.deployment]
    part = asked or min(1.0, kind.count / _num_replicas(groups, kind.kind))
    if part == 1 or not load_backend(group.backend).capabilities(kind.chip).can_share_chip:
        return group
    return replace(group, chips=max(1, int(part * _PARTS_OF_A_CHIP)) / _PARTS_OF_A_CHIP)


def _is_allowed(deployment: DeploymentConfig, kind: str) -> bool:
    where = deployment.where
    return (where.chips is None or kind in where.chips) and kind not in where.not_chips


def _planned_groups(
    file: DeploymentsFile,
    reports: Sequence[NodeReport],
    cards: Mapping[str, ChipCard],
    kinds: Mapping[str, OfferedKind],
) -> tuple[list[ReplicaGroup], dict[str, str]]:
    nodes = planned_nodes(reports, cards)
    if not nodes:
        raise BackendError("a load can be planned for on chips that have a card only, and no node offers one")
    plan = make_plan(file.model_copy(update={"cluster": file.cluster.model_copy(update={"nodes": nodes})}))
    configs = {deployment.served_name: deployment for deployment in file.deployments}
    groups, shortfalls = [], {}
    for planned in plan.deployments:
        groups += _groups_of_plan(file, configs[planned.name], planned, kinds)
        if planned.unserved or planned.missing_replicas:
            shortfalls[planned.name] = (
                f"{planned.unserved:.0%} of its load stays unserved, {planned.missing_replicas} replicas are missing: "
                "mxn plan --explain says what would help"
            )
    return groups, shortfalls


def _groups_of_plan(
    file: DeploymentsFile, config: DeploymentConfig, planned: PlannedDeployment, kinds: Mapping[str, OfferedKind]
) -> list[ReplicaGroup]:
    """A deployment's groups, largest first, which is the one that grows and shrinks."""
    merged: dict[tuple[str, str, str, float], tuple[Placement, int]] = {}
    for placement in planned.placements:
        key = placement.backend, placement.kind, placement.quantisation, placement.chips_per_replica
        _, count = merged.get(key, (placement, 0))
        merged[key] = placement, count + placement.replicas
    largest_first = sorted(merged.items(), key=lambda item: (-item[1][1], item[0]))
    total = sum(count for _, (_, count) in largest_first)
    names: set[tuple[str, str]] = set()
    groups = []
    for index, ((backend, kind, quantisation, chips), (placement, count)) in enumerate(largest_first):
        group = _group(file, config, kinds[kind], backend, replicas=count, others=total - count)
        if index:
            group = replace(group, min_replicas=count, max_replicas=count)
        is_double = (backend, kind) in names
        names.add((backend, kind))
        groups.append(
            replace(
                group,
                chips=chips,
                variant=f"{quantisation}-x{chips:g}" if is_double else "",
                settings=replace(group.settings, quantisation=quantisation),  # type: ignore[arg-type]  # a plan's formats are ours
                batch=placement.batch,
                output_tokens_per_s=placement.output_tokens_per_s,
                joules_per_token=1 / placement.tokens_per_watt if placement.tokens_per_watt else None,
            )
        )
    return groups


def _group(
    file: DeploymentsFile,
    deployment: DeploymentConfig,
    kind: OfferedKind,
    backend: str,
    *,
    replicas: int,
    others: int = 0,
) -> ReplicaGroup:
    """A group that may grow and shrink as far as the deployment's bounds let it. others: replicas of other groups."""
    bounds, slo = deployment.replicas, deployment.slo
    environment = file.cluster.ray.environments.get(backend, BackendEnvironment())
    return ReplicaGroup(
        deployment=deployment.served_name,
        model=deployment.model,
        backend=backend,
        kind=kind.kind,
        chips=1,
        chip_names=kind.names,
        uses_ray_gpus=kind.uses_ray_gpus,
        settings=deployment.load_settings(),
        replicas=replicas,
        min_replicas=replicas if bounds.max is None else max(1, min(replicas, bounds.min - others)),
        max_replicas=replicas if bounds.max is None else max(replicas, bounds.max - others),
        max_queue=deployment.max_queue or file.server.max_queue,
        stall_s=deployment.stall_s,
        ttft_s=slo.ttft_ms / 1e3 if slo.ttft_ms else None,
        tpot_s=slo.tpot_ms / 1e3 if slo.tpot_ms else None,
        percentile=slo.percentile,
        selector=_selector(deployment),
        runtime_env=environment.runtime_env(),
    )


def _selector(deployment: DeploymentConfig) -> dict[str, str]:
    """Labels of the nodes that the deployment may be on, as Ray writes such conditions."""
    allowed = {NODE_LABEL: deployment.where.nodes, RACK_LABEL: deployment.where.racks}
    return {label: f"in({','.join(names)})" for label, names in allowed.items() if names}
