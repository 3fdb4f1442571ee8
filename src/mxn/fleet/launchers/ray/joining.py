"""What a gateway on a Ray cluster should be joined to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mxn.core.chip import Chip
from mxn.fleet.launchers.ray.group import APP, ReplicaGroup
from mxn.fleet.spec import DeploymentSpec, FleetSpec, PlacementSpec

_RESTARTS = (0.0,) * 1000
"""Serve starts replicas again and waits between tries; a gateway only joins the next one."""


def fleet_spec(groups: Iterable[ReplicaGroup]) -> FleetSpec:
    """A placement for each replica that Serve may start. Fetches the models, whose tokenizers a gateway needs."""
    from mxn.store.fetch import fetch

    by_deployment: dict[str, list[ReplicaGroup]] = {}
    for group in groups:
        by_deployment.setdefault(group.deployment, []).append(group)
    deployments = []
    for name, mine in by_deployment.items():
        deployments.append(
            DeploymentSpec(
                name=name,
                model=replace(fetch(mine[0].model), name=name),
                placements=[placement for group in mine for placement in _placements(group)],
                max_queue=mine[0].max_queue,
                stall_s=mine[0].stall_s,
                restart_delays_s=_RESTARTS,
            )
        )
    return FleetSpec(deployments=deployments)


def _placements(group: ReplicaGroup) -> list[PlacementSpec]:
    """Their chips stand for whichever Ray gives them."""
    return [
        PlacementSpec(
            id=f"{group.app}/{index}",
            backend=group.backend,
            chips=[
                Chip(
                    uid=f"{group.app}/{index}",
                    kind=group.kind,
                    name=group.chip_names[0],
                    vendor="",
                    memory_bytes=0,
                    cores=0,
                    facts={APP: group.app},
                )
            ],
            settings=group.settings,
            output_tokens_per_s=group.output_tokens_per_s,
            joules_per_token=group.joules_per_token,
            why="Ray Serve keeps it",
        )
        for index in range(group.max_replicas)
    ]
