"""All deployments of one gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mxn.errors import ConfigError
from mxn.fleet.deployment import Deployment
from mxn.fleet.desired import read_wishes
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.spec import DeploymentSpec, FleetSpec, PlacementSpec
from mxn.fleet.state import RuntimeFolder
from mxn.fleet.supervisor import Resolve, Supervisor


class Fleet:
    """Finds deployments for the gateway; its supervisor sees to it that they run.

    spec: what should run from the start; deployments alone share their chips evenly.
    source: the file that says so, to be read again by `reload`.
    """

    def __init__(
        self,
        spec: FleetSpec | Sequence[DeploymentSpec],
        launcher: Launcher | None = None,
        *,
        folder: RuntimeFolder | None = None,
        source: Path | None = None,
        resolve: Resolve | None = None,
        drain_s: float = 30.0,
    ) -> None:
        self.source = source
        self._launcher = launcher or LocalLauncher()
        self.supervisor = Supervisor(self._launcher, folder=folder, drain_s=drain_s)
        self.supervisor.want(spec if isinstance(spec, FleetSpec) else FleetSpec(deployments=_sharing(spec)))

        self.supervisor.resolve = resolve

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
        self._keep_spares()

    async def reload(self, path: Path | None = None) -> None:
        """Goes over to what a file says now: its own, when none is named.

        Raises: MxnError when that cannot be done, with every fault of a bad file; what was wanted stays so then.
        """
        path = path or self.source
        if path is None:
            raise ConfigError("this server was started without a file: name one")
        await self.supervisor.apply(await asyncio.to_thread(read_wishes, path, self._pids))
        self._keep_spares()

    def _pids(self) -> list[int]:
        """Processes of the replicas that run."""
        replicas = [member.keeper.replica for member in self.supervisor.members]
        return [replica.info.pid for replica in replicas if replica is not None and replica.info is not None]

    async def drain(self) -> None:
        """Takes no new sequences anywhere."""
        for deployment in self.deployments:
            deployment.drain()

    async def stop(self, drain_s: float = 30.0) -> None:
        """Lets what runs finish for at most `drain_s` seconds, then ends all replicas."""
        await self.supervisor.stop(drain_s)
        if isinstance(self._launcher, LocalLauncher):
            await self._launcher.close()

    def _keep_spares(self) -> None:
        """Has a process wait, all but the model loaded, for each backend of a model that is loaded on demand."""
        on_demand = [deployment.spec for deployment in self.deployments if deployment.spec.is_on_demand]
        if isinstance(self._launcher, LocalLauncher):
            self._launcher.keep_spares(placement.backend for spec in on_demand for placement in spec.placements)


def _sharing(specs: Sequence[DeploymentSpec]) -> list[DeploymentSpec]:
    """The same, each placement answering for an even share of its chips' energy."""
    on_chip = Counter(chip.uid for spec in specs for placement in spec.placements for chip in placement.chips)

    def shared(placement: PlacementSpec) -> PlacementSpec:
        return replace(placement, chip_share=1 / max(on_chip[chip.uid] for chip in placement.chips))

    return [replace(spec, placements=tuple(map(shared, spec.placements))) for spec in specs]
