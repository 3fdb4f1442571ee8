"""All deployments of one gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mxn.engine.tokenizer import Tokenizer
from mxn.errors import ConfigError
from mxn.fleet.deployment import Deployment
from mxn.fleet.spec import DeploymentSpec, PlacementSpec


class Fleet:
    """Starts, finds and stops deployments."""

    def __init__(self, specs: Sequence[DeploymentSpec]) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            doubled = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"deployment names must differ; given more than once: {', '.join(doubled)}")
        on_chip = Counter(chip.uid for spec in specs for placement in spec.placements for chip in placement.chips)
        shared = [
            replace(spec, placements=tuple(_with_share(placement, on_chip) for placement in spec.placements))
            for spec in specs
        ]
        self._deployments = {spec.name: Deployment(spec, Tokenizer.load(spec.model.folder)) for spec in shared}

    @property
    def deployments(self) -> list[Deployment]:
        """In the order given."""
        return list(self._deployments.values())

    def get(self, name: str) -> Deployment | None:
        """The deployment that serves this model name, or None."""
        return self._deployments.get(name)

    async def start(self) -> None:
        """Starts all replicas, those that share a chip one after another. Returns when each is ready or failed."""
        by_chip: dict[tuple[str, ...], list[tuple[Deployment, PlacementSpec]]] = {}
        for deployment in self.deployments:
            for placement in deployment.spec.placements:
                chips = tuple(sorted(chip.uid for chip in placement.chips))
                by_chip.setdefault(chips, []).append((deployment, placement))
        await asyncio.gather(*(_start_in_order(group) for group in by_chip.values()))

    async def drain(self) -> None:
        """Takes no new sequences anywhere."""
        for deployment in self.deployments:
            deployment.drain()

    async def stop(self, drain_s: float = 30.0) -> None:
        """Lets what runs finish for at most `drain_s` seconds, then ends all replicas."""
        await asyncio.gather(*(d.stop(drain_s) for d in self.deployments))


async def _start_in_order(placements: list[tuple[Deployment, PlacementSpec]]) -> None:
    for deployment, placement in placements:
        keeper = deployment.add(placement)
        await asyncio.gather(keeper.wait_until_settled(), return_exceptions=True)


def _with_share(placement: PlacementSpec, on_chip: Counter[str]) -> PlacementSpec:
    return replace(placement, chip_share=1 / max(on_chip[chip.uid] for chip in placement.chips))
