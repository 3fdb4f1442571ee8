"""The chips of a Ray cluster: what its nodes offer as resources, and what backends see of them there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from mxn.backends.survey import physical_chips, survey
from mxn.config.chip_card import ChipCard, find_chip_card
from mxn.config.cluster import NodeConfig
from mxn.core.chip import Chip
from mxn.errors import ConfigError

GIB = 1 << 30
RESOURCE_PREFIX = "chip:"
"""A node offers its chips as custom resources: `chip:h100-sxm` with how many of that kind it has."""

NODE_LABEL = "mxn.io/node"
RACK_LABEL = "mxn.io/rack"

_RAY_GPU_VENDORS = ("nvidia", "amd")
"""Whose chips Ray finds by itself, counts as its resource GPU and hides from those that did not ask for them."""


class SeenChip(msgspec.Struct, frozen=True):
    """A chip of a node, and the backends that reach it there."""

    chip: Chip
    backends: tuple[str, ...]


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a Ray cluster.

    name: its label, else what Ray calls it. offered: chips of each kind. ray_gpus: what Ray counts as its GPUs.
    """

    node_id: str
    name: str
    rack: str | None
    offered: dict[str, float]
    ray_gpus: float
    chips: tuple[SeenChip, ...]


class OfferedKind(msgspec.Struct, frozen=True, kw_only=True):
    """Chips of one kind in one node. chip: the first of them. names: as drivers call them."""

    kind: str
    count: int
    chip: Chip
    names: tuple[str, ...]
    backends: tuple[str, ...]
    uses_ray_gpus: bool


def seen_here() -> list[SeenChip]:
    """This host's chips, simulated ones included."""
    return [SeenChip(seen.chip, seen.backends) for seen in physical_chips(survey())]


def kind_of(chip: Chip, cards: Mapping[str, ChipCard]) -> str:
    """The id of the chip's card; what its backend calls its kind, or its uid, where no card matches."""
    card = cards.get(chip.kind or "") or find_chip_card(cards, chip.name)
    return card.id if card else chip.kind or chip.uid


def resources_of(seen: Iterable[SeenChip], cards: Mapping[str, ChipCard], *, simulated: bool = False) -> dict[str, int]:
    """What a node with these chips offers to Ray. simulated: with those that only the fake backend has."""
    counts: dict[str, int] = {}
    for one in seen:
        if simulated or one.backends != ("fake",):
            name = RESOURCE_PREFIX + kind_of(one.chip, cards)
            counts[name] = counts.get(name, 0) + 1
    return counts


def offered_kinds(report: NodeReport, cards: Mapping[str, ChipCard]) -> Iterator[OfferedKind]:
    """The kinds of chip that a node offers. Raises: ConfigError when no backend there sees one of them."""
    for kind, count in report.offered.items():
        mine = [one for one in report.chips if kind_of(one.chip, cards) == kind]
        if not mine:
            seen = ", ".join(sorted({kind_of(one.chip, cards) for one in report.chips})) or "none"
            raise ConfigError(
                f'node {report.name} offers the resource "{RESOURCE_PREFIX}{kind}", and no backend there sees such a '
                f"chip; seen: {seen}"
            )
        first = mine[0].chip
        yield OfferedKind(
            kind=kind,
            count=min(int(count), len(mine)),
            chip=first,
            names=tuple(sorted({one.chip.kind or one.chip.name for one in mine})),
            backends=mine[0].backends,
            uses_ray_gpus=report.ray_gpus > 0 and first.vendor.lower() in _RAY_GPU_VENDORS and first.uid != "cpu-0",
        )


def planned_nodes(reports: Sequence[NodeReport], cards: Mapping[str, ChipCard]) -> tuple[NodeConfig, ...]:
    """The nodes as a file's `cluster.nodes` would have them, without chips that have no card: no plan can use those."""
    nodes = []
    for report in reports:
        kinds = [kind for kind in offered_kinds(report, cards) if kind.kind in cards and kind.count]
        if not kinds:
            continue
        hosts = [kind.chip.memory_bytes / GIB * kind.count for kind in kinds if cards[kind.kind].kind == "cpu"]
        nodes.append(
            NodeConfig(
                name=report.name,
                chips={kind.kind: kind.count for kind in kinds},
                rack=report.rack,
                host_memory_gib=sum(hosts) or None,
                backends=tuple(dict.fromkeys(b for kind in kinds for b in kind.backends if b != "fake")) or None,
            )
        )
    return tuple(nodes)
