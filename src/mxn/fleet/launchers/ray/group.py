"""What a Ray cluster is asked to run: equal replicas, one Serve deployment for each kind of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from mxn.core.model import LoadSettings

APP = "ray-app"
"""Fact of a placement's chips: the Serve application whose replicas stand there."""

HOST = "ReplicaHost"
"""Name of the Serve deployment in every application that holds replicas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaGroup:
    """Replicas of a deployment that differ in nothing but their place.

    deployment: name that clients ask for. model: what the store fetches, on every node for itself.
    kind: of the chips. chip_names: as drivers call them. chips: of one replica; below 1 a part of one.
    variant: tells groups apart that differ in format or size only.
    uses_ray_gpus: Ray counts these chips as its GPUs, hides those of others, and wants to be asked for them too.
    min_replicas, max_replicas: bounds of autoscaling; equal where the number is fixed. replicas: to begin with.
    batch: sequences that a replica decodes together within its SLO, which autoscaling goes by.
    ttft_s, tpot_s, percentile: the SLO. selector: labels that a node must carry.
    runtime_env: Ray's, for the replica's process: packages, image, variables.
    """

    deployment: str
    model: str
    backend: str
    kind: str
    variant: str = ""
    chips: float
    chip_names: tuple[str, ...]
    uses_ray_gpus: bool = False
    settings: LoadSettings = field(default_factory=LoadSettings)
    replicas: int = 1
    min_replicas: int = 1
    max_replicas: int = 1
    max_queue: int = 256
    stall_s: float = 60.0
    batch: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 95.0
    selector: Mapping[str, str] = field(default_factory=dict)
    runtime_env: Mapping[str, object] = field(default_factory=dict)
    output_tokens_per_s: float | None = None
    joules_per_token: float | None = None

    @property
    def app(self) -> str:
        """Name of its Serve application, unique in the cluster and the same after a restart."""
        parts = [part for part in ("mxn", self.deployment, self.backend, self.kind, self.variant) if part]
        return ".".join(re.sub(r"[^A-Za-z0-9_-]", "-", part) for part in parts)


class Welcome(msgspec.Struct):
    """What a replica says first to a gateway that joins it."""

    replica_id: str
    pid: int
    node: str
