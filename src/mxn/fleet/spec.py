"""What a fleet should be: its deployments, each a model and the placements of its replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.engine.messages import Load


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementSpec:
    """One replica on named chips through one backend.

    id: unique in the fleet and the same across restarts, such as "smollm2/0".
    environment: variables to set for its process.
    chip_share: the share of its chips' energy that it answers for, when other placements are on them too.
    output_tokens_per_s, joules_per_token: what the plan expects of it at full load; the router goes by them until the
      replica has measured its own. None when nothing planned it.
    memory_bytes: what it is expected to take of each of its chips' memory; 0 when nobody reckoned it.
    why: how backend, chips and settings were chosen.
    """

    id: str
    backend: str
    chips: Sequence[Chip]
    settings: LoadSettings = field(default_factory=LoadSettings)
    environment: Mapping[str, str] = field(default_factory=dict)
    chip_share: float = 1.0
    output_tokens_per_s: float | None = None
    joules_per_token: float | None = None
    memory_bytes: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentSpec:
    """A model and how it should be served.

    placements: its replicas, in the order in which they are started.
    max_queue: sequences that may wait beside those that run; more are refused with 429.
    max_wait_s: how long a sequence may wait for a replica: in line, and again when it has lost one.
    ttft_slo_s: limit on the time to the first token; while it is far, the router goes by energy too.
    stall_s: a replica that holds work and ends no step for so long hangs: it is ended and started again.
    restart_delays_s: waits before each restart in a row; after the last one the placement stays failed.
    keep_loaded: false loads it when it is first asked for, and unloads it when others need its room.
    idle_unload_s: it is unloaded after so long without a request, and loaded again when asked for.
    """

    name: str
    model: Model
    placements: Sequence[PlacementSpec]
    max_queue: int = 256
    max_wait_s: float = 60.0
    ttft_slo_s: float | None = None
    stall_s: float = 60.0
    restart_delays_s: tuple[float, ...] = (0.0, 1.0, 5.0, 20.0)
    keep_loaded: bool = True
    idle_unload_s: float | None = None

    @property
    def is_on_demand(self) -> bool:
        """True when it may be without a replica until somebody asks for it."""
        return not self.keep_loaded or self.idle_unload_s is not None

    @classmethod
    def single(
        cls,
        *,
        name: str,
        model: Model,
        backend: str,
        chips: Sequence[Chip],
        settings: LoadSettings | None = None,
        **fields: object,
    ) -> Self:
        """A deployment of one replica. fields: any others of this class."""
        placement = PlacementSpec(id=f"{name}/0", backend=backend, chips=chips, settings=settings or LoadSettings())
        return cls(name=name, model=model, placements=(placement,), **fields)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetSpec:
    """All deployments, as far as there are chips for them.

    memory_bytes: what replicas may take of each chip's memory together, by chip uid; a chip that is not named has room.
    shortfalls: by deployment, why it has fewer replicas than it should.
    """

    deployments: Sequence[DeploymentSpec]
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    shortfalls: Mapping[str, str] = field(default_factory=dict)


def load_of(spec: DeploymentSpec, placement: PlacementSpec) -> Load:
    """What the replica of a placement is told to load."""
    return Load(
        backend=placement.backend,
        model=spec.model,
        settings=placement.settings,
        chips=list(placement.chips),
        max_waiting=spec.max_queue,
        chip_share=placement.chip_share,
    )
