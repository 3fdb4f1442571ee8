"""What a deployment should be: a model, and the placements of its replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementSpec:
    """One replica on named chips through one backend.

    id: unique in the fleet and the same across restarts, such as "smollm2/0".
    environment: variables to set for its process.
    chip_share: the share of its chips' energy that it answers for, when other placements are on them too.
    output_tokens_per_s, joules_per_token: what the plan expects of it at full load; the router goes by them until the
      replica has measured its own. None when nothing planned it.
    """

    id: str
    backend: str
    chips: Sequence[Chip]
    settings: LoadSettings = field(default_factory=LoadSettings)
    environment: Mapping[str, str] = field(default_factory=dict)
    chip_share: float = 1.0
    output_tokens_per_s: float | None = None
    joules_per_token: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentSpec:
    """A model and how it should be served.

    placements: its replicas, in the order in which they are started.
    max_queue: sequences that may wait beside those that run; more are refused with 429.
    stall_s: a replica that holds work and ends no step for so long is taken for hung.
    restart_delays_s: waits before each restart in a row; after the last one the placement stays failed.
    """

    name: str
    model: Model
    placements: Sequence[PlacementSpec]
    max_queue: int = 256
    stall_s: float = 60.0
    restart_delays_s: tuple[float, ...] = (0.0, 1.0, 5.0, 20.0)

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
