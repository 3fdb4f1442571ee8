"""All deployments of one gateway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mxn.fleet.deployment import Deployment
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.spec import DeploymentSpec, FleetSpec, PlacementSpec
from mxn.fleet.state import RuntimeFolder
from mxn.fleet.supervisor import Supervisor


class Fleet:
    """Finds deployments for the gateway; its supervisor sees to it that they run.

    spec: what should run from the start; deployments alone share their chips evenly.
    """

    def __init__(
        self,
        spec: FleetSpec | Sequence[DeploymentSpec],
        launcher: Launcher | None = None,
        *,
        folder: RuntimeFolder | None = None,
        drain_s: float = 30.0,
    ) -> None:
        self.supervisor = Supervisor(launcher or LocalLauncher(), folder=folder, drain_s=drain_s)
        self.supervisor.want(spec if isinstance(spec, FleetSpec) else FleetSpec(deployments=_sharing(spec)))

    @property
    def deployments(self) -> list[Deployment]:
        """In the order given."""
        return self.supervisor.deployments

    def get(self, name: str) -> Deployment | None:
        """The deployment that serves this model name, or None."""
        return self.supervisor.get(name)

    async def start(self) -> None:
        """Starts what should run. Returns when every replica is ready or failed."""
        self.supervisor.start()
        await self.supervisor.wait_until_settled()

    async def drain(self) -> None:
        """Takes no new sequences anywhere."""
        for deployment in self.deployments:
            deployment.drain()

    async def stop(self, drain_s: float = 30.0) -> None:
        """Lets what runs finish for at most `drain_s` seconds, then ends all replicas."""
        await self.supervisor.stop(drain_s)


def _sharing(specs: Sequence[DeploymentSpec]) -> list[DeploymentSpec]:
    """The same, each placement answering for an even share of its chips' energy."""
    on_chip = Counter(chip.uid for spec in specs for placement in spec.placements for chip in placement.chips)

    def shared(placement: PlacementSpec) -> PlacementSpec:
        return replace(placement, chip_share=1 / max(on_chip[chip.uid] for chip in placement.chips))

    return [replace(spec, placements=tuple(map(shared, spec.placements))) for spec in specs]
