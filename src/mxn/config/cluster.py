"""What `mxn.yaml` says of the cluster a plan is made for: nodes with their chips, power budgets, declared backends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mxn.config.checked import Checked
from mxn.config.chip_card import ChipCard, Id
from mxn.config.ray import RayConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Watts = Annotated[float, Field(gt=0, le=1e9)]
Gib = Annotated[float, Field(ge=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=100_000)]
PlannedQuantisation = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
Objective = Literal["watts", "tokens_per_watt", "cost", "latency", "goodput"]


class NodeConfig(Checked):
    """One node, or `count` equal ones."""

    name: Name
    count: Count = 1
    """Equal nodes of this description; they are called name-0, name-1 and so on."""
    chips: Annotated[dict[Id, Count], Field(min_length=1)] | Literal["here"] = "here"
    """Chips of each kind by the id of their card; "here" takes what backends find on this host."""
    rack: Name | None = None
    power_w: Watts | None = None
    """What one node's chips may draw."""
    reserve_gib: Gib = 0.0
    """Memory of every chip that is left alone."""
    host_memory_gib: Gib | None = None
    """Memory of the node, which is what a CPU's models live in."""
    backends: tuple[Name, ...] | None = None
    """Backends installed there; all that reach a chip of its kind when left out."""


class RackConfig(Checked):
    """Nodes that share a power feed and fail together."""

    name: Name
    power_w: Watts | None = None
    """What its nodes' chips may draw together."""


class BackendConfig(Checked):
    """A backend that mxn does not come with, such as a vendor's server, as far as a plan needs to know it."""

    name: Name
    chips: Annotated[tuple[Id, ...], Field(min_length=1)]
    """Chip kinds it runs on."""
    quantisations: Annotated[tuple[PlannedQuantisation, ...], Field(min_length=1)]
    max_chips: Literal[1, 2, 4, 8] = 1
    """Chips that one replica may be split over."""
    can_share_chip: bool = False
    """Whether several replicas may live on one chip."""
    overhead_gib: Gib = 2.0
    """Memory it takes on every chip beside weights, KV cache and activations."""


class ClusterConfig(Checked):
    """The chips there are, or might be."""

    nodes: Annotated[tuple[NodeConfig, ...], Field(min_length=1, max_length=10_000)] = (NodeConfig(name="here"),)
    racks: tuple[RackConfig, ...] = ()
    power_w: Watts | None = None
    """What all chips may draw together."""
    unused_chips: Literal["off", "idle"] = "off"
    """Whether chips without replicas are switched off or draw their idle watts."""
    chips: tuple[ChipCard, ...] = ()
    """Cards of chips that mxn has none of, written out: a chip that one thinks of buying needs no driver here."""
    backends: tuple[BackendConfig, ...] = ()
    launcher: Literal["local", "ray"] = "local"
    """Where replicas run: as processes of this machine, or on a Ray cluster, whose nodes stand for `nodes` then."""
    adopt_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """With the launcher local: how long replicas keep their models for the next server when theirs is gone."""
    ray: RayConfig = RayConfig()
    """For the launcher ray."""


class StabilityConfig(Checked):
    """When a replica that runs is worth moving."""

    min_gain: Annotated[float, Field(ge=0, le=10)] = 0.05
    """Share of a replica's cost that moving it must save."""
    loading_is_spread_over_s: Annotated[float, Field(gt=0, le=1e8)] = 3600.0
    """A started replica costs its load time as if it lasted so long."""


class LimitsConfig(Checked):
    """What a whole plan may not exceed. Power budgets are the cluster's, limits on latency each deployment's."""

    usd_per_hour: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """What all chips that replicas use may cost, by the cards' tco_usd_per_hour, else price_usd_per_hour."""


class PolicyConfig(Checked):
    """What a plan is made for, once everybody is served."""

    objective: Objective | Annotated[tuple[Objective, ...], Field(min_length=1, max_length=5)] = "watts"
    """What to save; of a list, later ones decide between plans that are equal in the earlier ones."""
    fallback: Literal["refuse", "warn", "allow"] = "refuse"
    """When load stays unserved: fail, warn, or take it."""
    limits: LimitsConfig = LimitsConfig()
    """What a plan may not exceed."""
    stability: StabilityConfig = StabilityConfig()
    """When replicas that run are moved."""
    effort: Literal["fast", "refined", "exact"] | None = None
    """How hard to look; by the size of the problem when left out."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return (self.objective,) if isinstance(self.objective, str) else self.objective
