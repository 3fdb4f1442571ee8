"""The chips a plan may use: those that backends find on this host, and those that a file describes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mxn.config.chip_card import ChipCard, find_chip_card, load_chip_cards
from mxn.config.cluster import BackendConfig, ClusterConfig, NodeConfig
from mxn.core.chip import Chip
from mxn.errors import ConfigError
from mxn.fleet.calibration.fitting import Calibration
from mxn.fleet.calibration.memory import MemoryObservation

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class ChipKind:
    """Chips that are equal as far as a plan can see.

    card: its data sheet; None for a chip found here that no card matches.
    chip: as a backend is asked about it. is_here: found on this host, not only described.
    """

    name: str
    card: ChipCard | None
    chip: Chip
    is_here: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.card.kind == "cpu" if self.card else self.chip.uid.startswith("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChipGroup:
    """Chips of one kind in equal nodes.

    node: name of the entry that describes the nodes. index: which of its nodes, None for all of them.
    memory_bytes: of one chip, its reserve taken off. backends: names of those installed there.
    """

    node: str
    index: int | None = None
    num_nodes: int
    kind: str
    chips_per_node: int
    memory_bytes: float
    backends: tuple[str, ...]
    rack: str | None = None
    node_power_w: float | None = None

    @property
    def num_chips(self) -> int:
        return self.num_nodes * self.chips_per_node

    @property
    def place(self) -> str:
        return self.node if self.index is None else f"{self.node}-{self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """Every physical chip once. rack_power_w: of racks that have a budget. declared: backends that only the file knows.

    unused_chips_idle: chips without replicas draw their idle watts; otherwise they are off.
    calibration, memory: what `mxn calibrate` measured and what loads were seen to take.
    """

    kinds: Mapping[str, ChipKind]
    groups: tuple[ChipGroup, ...]
    rack_power_w: Mapping[str, float]
    site_power_w: float | None
    unused_chips_idle: bool
    declared: Mapping[str, BackendConfig]
    calibration: Calibration = field(default_factory=Calibration)
    memory: tuple[MemoryObservation, ...] = ()

    def num_chips(self, kind: str) -> int:
        """Chips of a kind."""
        return sum(group.num_chips for group in self.groups if group.kind == kind)


def take_inventory(cluster: ClusterConfig) -> Inventory:
    """The cluster's chips. Backends are asked only where a node says "here".

    Raises: ConfigError for chips without a card, or a CPU whose memory is not given.
    """
    cards = {**load_chip_cards(), **{card.id: card for card in cluster.chips}}
    kinds: dict[str, ChipKind] = {}
    groups: list[ChipGroup] = []
    faults: list[str] = []
    here = [node for node in cluster.nodes if node.chips == "here"]
    if len(here) > 1 or any(node.count > 1 for node in here):
        raise ConfigError('cluster.nodes: only one node can be "here", and only once; describe the chips of the others')
    for node in cluster.nodes:
        found = _found_here(node, cards) if node.chips == "here" else _described(node, cards, faults)
        for kind, group in found:
            known = kinds.get(kind.name)
            kinds[kind.name] = kind if known is None or kind.is_here else known
            groups.append(group)
    if faults:
        raise ConfigError("\n".join(faults))
    declared = {backend.name: backend for backend in cluster.backends}
    return Inventory(
        kinds=kinds,
        groups=tuple(_with_declared(group, cluster) for group in groups),
        rack_power_w={rack.name: rack.power_w for rack in cluster.racks if rack.power_w is not None},
        site_power_w=cluster.power_w,
        unused_chips_idle=cluster.unused_chips == "idle",
        declared=declared,
    )


def change_inventory(inventory: Inventory, changes: str) -> Inventory:
    """The inventory with chips bought or given away: "+2 mi300x,-1 h100-sxm".

    New chips come as one node called "what-if" for every eight; gone chips are taken from the last nodes that have any.
    Raises: ConfigError naming the word that cannot be read, the chip that has no card, or that there are not so many.
    """
    cards = load_chip_cards()
    kinds, groups = dict(inventory.kinds), list(inventory.groups)
    for word in filter(None, (part.strip() for part in changes.split(","))):
        match = re.fullmatch(r"([+-]?)(\d{1,6})\s*(?:x\s*)?([a-z0-9][a-z0-9.-]*)", word)
        if match is None or int(match[2]) == 0:
            raise ConfigError(f'--what-if: expected words like "+2 mi300x" or "-1 h100-sxm", got "{word}"')
        count, name = int(match[2]), match[3]
        if match[1] == "-":
            groups = _without(groups, name, count)
            continue
        kind = kinds.get(name) or (_kind(cards[name]) if name in cards else None)
        if kind is None:
            raise ConfigError(f'--what-if: no chip card is called "{name}"; there are: {", ".join(sorted(cards))}')
        kinds[name] = kind
        like = next((group for group in groups if group.kind == name), None)
        memory = like.memory_bytes if like else _card_memory(kind)
        if memory is None:
            raise ConfigError(f"--what-if: {name} uses its node's memory, and no node here has one like it")
        backends = like.backends if like else (*_reaching(kind), *_declared_for(inventory.declared.values(), name))
        for size, num in ((8, count // 8), (count % 8, 1)):
            if size and num:
                groups.append(
                    ChipGroup(
                        node=f"what-if-{name}-{size}",
                        num_nodes=num,
                        kind=name,
                        chips_per_node=size,
                        memory_bytes=memory,
                        backends=backends,
                    )
                )
    return replace(inventory, kinds=kinds, groups=tuple(groups))


def _without(groups: Sequence[ChipGroup], kind: str, count: int) -> list[ChipGroup]:
    there = sum(group.num_chips for group in groups if group.kind == kind)
    if count > there:
        raise ConfigError(f"--what-if: {count} {kind} cannot be taken away, there are {there}")
    kept: list[ChipGroup] = []
    for group in reversed(groups):
        taken = min(count, group.num_chips) if group.kind == kind else 0
        count -= taken
        whole, rest = divmod(group.num_chips - taken, group.chips_per_node)
        if rest:
            kept.append(replace(group, node=f"{group.node}-rest", num_nodes=1, chips_per_node=rest))
        if whole:
            kept.append(replace(group, num_nodes=whole))
    return kept[::-1]


def _found_here(node: NodeConfig, cards: Mapping[str, ChipCard]) -> list[tuple[ChipKind, ChipGroup]]:
    """Chips that backends see on this host; those of simulated chips are left out."""
    from mxn.backends.survey import physical_chips, survey

    surveys = survey()
    found: dict[str, tuple[ChipKind, ChipGroup]] = {}
    for seen in physical_chips(surveys):
        backends = tuple(name for name in seen.backends if not surveys[name].is_scripted)
        if node.backends is not None:
            backends = tuple(name for name in backends if name in node.backends)
        if not backends:
            continue
        card = cards.get(seen.chip.kind or "") or find_chip_card(cards, seen.chip.name)
        name = card.id if card else seen.chip.uid
        memory = seen.chip.memory_bytes - node.reserve_gib * GIB
        if name in found:
            kind, group = found[name]
            memory = min(memory, group.memory_bytes)
            found[name] = kind, replace(group, chips_per_node=group.chips_per_node + 1, memory_bytes=memory)
            continue
        kind = ChipKind(name=name, card=card, chip=seen.chip, is_here=True)
        found[name] = kind, _group(node, name, 1, memory, backends)
    return list(found.values())


def _described(node: NodeConfig, cards: Mapping[str, ChipCard], faults: list[str]) -> list[tuple[ChipKind, ChipGroup]]:
    chips = node.chips if isinstance(node.chips, dict) else {}
    found = []
    sockets = sum(count for name, count in chips.items() if name in cards and cards[name].kind == "cpu")
    for name, count in chips.items():
        if name not in cards:
            faults.append(f'cluster.nodes "{node.name}": no chip card is called "{name}"; there are: {_names(cards)}')
            continue
        kind = _kind(cards[name])
        memory = _card_memory(kind)
        if kind.is_cpu:
            if node.host_memory_gib is None:
                faults.append(f'cluster.nodes "{node.name}": {name} uses the node\'s memory: set host_memory_gib')
                continue
            memory = node.host_memory_gib * GIB / sockets
        if memory is None:
            faults.append(f'cluster.nodes "{node.name}": the card of {name} does not know its memory')
            continue
        reaching = _reaching(kind) if node.backends is None else node.backends
        found.append((kind, _group(node, name, count, memory - node.reserve_gib * GIB, reaching)))
    return found


def _group(node: NodeConfig, kind: str, count: int, memory: float, backends: tuple[str, ...]) -> ChipGroup:
    return ChipGroup(
        node=node.name,
        num_nodes=node.count,
        kind=kind,
        chips_per_node=count,
        memory_bytes=max(0.0, memory),
        backends=backends,
        rack=node.rack,
        node_power_w=node.power_w,
    )


def _with_declared(group: ChipGroup, cluster: ClusterConfig) -> ChipGroup:
    """The group with the declared backends of its kind, where the node does not name its backends itself."""
    named = next((node.backends for node in cluster.nodes if node.name == group.node), None)
    if named is not None:
        return group
    return replace(group, backends=(*group.backends, *_declared_for(cluster.backends, group.kind)))


def _declared_for(backends: Iterable[BackendConfig], kind: str) -> tuple[str, ...]:
    return tuple(backend.name for backend in backends if kind in backend.chips)


def _kind(card: ChipCard) -> ChipKind:
    """A described chip as its vendor's backend would name it, with the newest target its rates speak for."""
    memory = int(card.memory_gib.value * GIB) if card.memory_gib else 0
    rates = card.compute
    target = ""
    if card.vendor == "nvidia":
        target = "sm_90" if rates.fp8_tflops else "sm_80" if rates.bf16_tflops else "sm_75"
    elif card.vendor == "amd" and card.kind == "gpu":
        target = "gfx942" if rates.fp8_tflops else "gfx90a"
    chip = Chip(
        uid="cpu-described" if card.kind == "cpu" else f"described-{card.id}",
        kind=card.id,
        name=card.name,
        vendor=card.vendor,
        memory_bytes=memory,
        cores=1,
        facts={"target": target},
    )
    return ChipKind(name=card.id, card=card, chip=chip)


def _reaching(kind: ChipKind) -> tuple[str, ...]:
    """mxn's own backends for a described chip."""
    if kind.is_cpu:
        return ("cpu", "onnx")
    if kind.card is not None and kind.card.kind == "gpu":
        return {"nvidia": ("cuda",), "amd": ("rocm",)}.get(kind.card.vendor, ())
    return ()


def _card_memory(kind: ChipKind) -> float | None:
    return kind.card.memory_gib.value * GIB if kind.card and kind.card.memory_gib else None


def _names(cards: Mapping[str, ChipCard]) -> str:
    return ", ".join(sorted(cards))
