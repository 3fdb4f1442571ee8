"""A replica as the supervisor knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from mxn.engine.messages import load_key
from mxn.fleet.deployment import Deployment
from mxn.fleet.keeper import Keeper
from mxn.fleet.replica import Replica
from mxn.fleet.spec import DeploymentSpec, PlacementSpec, load_of


@dataclass(slots=True)
class Member:
    """A replica that is there. key: what it was started as. ending: set while it is being drained and stopped."""

    deployment: Deployment
    keeper: Keeper
    key: str
    ending: asyncio.Task[None] | None = None

    @property
    def placement(self) -> PlacementSpec:
        return self.keeper.placement

    @property
    def holds_memory(self) -> bool:
        """False once it has failed for good: its process is gone."""
        return self.ending is not None or self.keeper.state != "failed"

    @property
    def is_moving(self) -> bool:
        """True while it is on its way to be ready, or back to it."""
        keeper = self.keeper
        return not keeper.is_settled or (keeper.state == "ready" and not keeper.is_ready)

    def answer_for(self, chip_share: float) -> None:
        """Has it answer for another share of its chips' energy, now and after a restart."""
        keeper = self.keeper
        if keeper.placement.chip_share != chip_share:
            keeper.placement = replace(keeper.placement, chip_share=chip_share)
            if isinstance(keeper.replica, Replica) and not keeper.replica.ended.is_set():
                keeper.replica.change_share(chip_share)

    def is_on(self, chip: str) -> bool:
        """Whether the chip of this uid is among its own."""
        return any(one.uid == chip for one in self.placement.chips)


def key_of(spec: DeploymentSpec, placement: PlacementSpec) -> str:
    """What makes two placements the same replica."""
    return load_key(load_of(spec, placement)) + repr(sorted(placement.environment.items()))
