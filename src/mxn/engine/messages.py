"""What a gateway and a replica process say to each other, as msgpack frames. No pickle; unknown tags are refused."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.core.request import SequenceOutput, SequenceRequest
from mxn.engine.stats import EngineStats

# ---------------------------------------------------------------- gateway -> replica


class Prepare(msgspec.Struct, tag=True):
    """Before `Load`, perhaps long before: import what this backend needs to load a model."""

    backend: str


class Load(msgspec.Struct, tag=True, kw_only=True):
    """What to load, through which backend, on which chips.

    chip_share: the share of the chips' energy that this replica answers for; below 1 when others run on them too.
    """

    backend: str
    model: Model
    settings: LoadSettings
    chips: list[Chip]
    max_waiting: int
    chip_share: float = 1.0


def load_key(load: Load) -> str:
    """A hash of what is to be loaded; what of the chips' memory and energy is its own at the moment does not count."""
    parts = (load.backend, load.model, load.settings, [chip.uid for chip in load.chips], load.max_waiting)
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()[:32]


class Start(msgspec.Struct, tag=True):
    """Begin a sequence."""

    request: SequenceRequest


class Abort(msgspec.Struct, tag=True):
    """End sequences now; each answers with an output whose finish reason is abort, unless it had already ended."""

    seq_ids: list[int]


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Forget all cached prefixes that no running sequence holds."""


class ReportBlocks(msgspec.Struct, tag=True):
    """Tell from now on which prefix blocks are held, beginning with those that are; who has none says nothing."""


class ChangeShare(msgspec.Struct, tag=True):
    """Answer for another share of the chips' energy from now on: others have come there, or gone."""

    chip_share: float


class Stop(msgspec.Struct, tag=True):
    """Finish what runs, then exit 0."""


# ---------------------------------------------------------------- replica -> gateway


class LoadPhase(msgspec.Struct, tag=True):
    """Progress of loading: `fraction` of `phase` is done."""

    phase: str
    fraction: float


class ReplicaInfo(msgspec.Struct, kw_only=True):
    """What a replica runs and how, as decided at load time.

    weight_bytes, kv_bytes: None where a server keeps them to itself.
    memory_bytes: that it takes once warmed up, by the backend's own meter; None where there is none.
    load_peak_bytes: the most that it held while it loaded, on a processor, whose memory is its process's.
    num_blocks, block_size: 0 where mxn divides no cache.
    dimensions: numbers in a vector, from a model that embeds.
    refused: request fields that it cannot serve, by the names of the API.
    can_continue: it goes on with a sequence that another replica began, by the same tokens if it is of the same kind.
    prefix_fingerprint: what, beside tenant and tokens, the hashes of its blocks are made of; empty when it has none.
    """

    pid: int
    backend: str
    attention: str
    quantisation: str
    device: str
    threads: int | None
    weight_bytes: int | None
    kv_bytes: int | None
    num_blocks: int
    block_size: int
    max_context: int
    vocab_size: int
    program: str = "unknown"
    notes: list[str]
    load_s: dict[str, float]
    dimensions: int | None = None
    refused: list[str] = []
    can_continue: bool = False
    prefix_fingerprint: str = ""
    memory_bytes: float | None = None
    load_peak_bytes: float | None = None
    power_source: str = "none"
    power_provenance: str = "unavailable"

    def add_launch(self, took_s: float) -> None:
        """Makes the phases of a start sum to the time from launch to ready: what the replica could not see is "launch".

        One that had run before and was only found again keeps the phases of its start.
        """
        launch_s = took_s - sum(self.load_s.values())
        if launch_s > 0:
            self.load_s = {"launch": round(launch_s, 4), **self.load_s}


class Ready(msgspec.Struct, tag=True):
    """Loading is done; sequences may start."""

    info: ReplicaInfo


class LoadFailed(msgspec.Struct, tag=True):
    """Loading ended in an error fit for a person; `kind` is the exception's class name."""

    kind: str
    message: str


class StepDone(msgspec.Struct, tag=True):
    """All outputs of one step in one message."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class BlocksChanged(msgspec.Struct, tag=True):
    """Which full blocks became reusable and which no longer are: heads of their hashes, `HEAD_BYTES` each, joined."""

    stored: bytes
    evicted: bytes


class Alive(msgspec.Struct, tag=True):
    """Nothing happened, but the process lives. A replica is never silent for longer than `ALIVE_S`."""


class ChipLost(msgspec.Struct, tag=True):
    """The chip is gone; the replica ends after this, its last message."""

    message: str


ToReplica = Prepare | Load | Start | Abort | ResetPrefixCache | ReportBlocks | ChangeShare | Stop
ToGateway = LoadPhase | Ready | LoadFailed | StepDone | BlocksChanged | Alive | ChipLost
ReplicaState = Literal["unloaded", "starting", "loading", "ready", "draining", "failed", "stopped"]

ALIVE_S = 1.0
"""Seconds that a replica which is ready is silent at most."""

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""A frame is a 4-byte little-endian length and that many bytes of msgpack; longer ones end the connection."""
