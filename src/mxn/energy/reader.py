"""The interface every source of energy figures has."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class ReaderKind(StrEnum):
    """How a reader comes by its joules."""

    COUNTER = "counter"  # hardware counts energy
    SAMPLED = "sampled"  # watts are sampled and integrated
    MODELLED = "modelled"  # computed from utilisation: an estimate
    EXTERNAL = "external"  # a meter outside the host
    REPLAY = "replay"  # a recorded or scripted trace
    NONE = "none"  # there is no source


class Scope(StrEnum):
    """What the joules include."""

    DEVICE = "device"
    HOST = "host"
    NODE = "node"
    WALL = "wall"
    FACILITY = "facility"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Cumulative energy at one moment.

    energy_j: joules since an arbitrary start; None when unavailable (then `reason` says why). Never decreases.
    time_s: monotonic seconds at which the value held.
    num_breaks: times the source lost energy so far (reset, jump, gap). Two readings may be subtracted only when
      these are equal.
    """

    energy_j: float | None
    time_s: float
    reason: str | None = None
    num_breaks: int = 0


class PowerReader(Protocol):
    """A source of cumulative energy for one scope.

    name: short, shown beside every figure ("nvml-energy", "rapl-package", "modelled-cpu", "none").
    detail: one sentence: what is read, from where, and its limits.
    relative_error: 1.0 means within a factor of two; None when the source states none.
    update_period_s: how stale a value may be; a window's edge error is this over its length. 0 when always current.
    """

    name: str
    kind: ReaderKind
    scope: Scope
    detail: str
    relative_error: float | None
    update_period_s: float

    def read(self) -> Reading:
        """The counter now. Never raises for a source that went away: the reading says so."""

    def close(self) -> None:
        """Stops sampling threads and releases handles. Safe to call twice."""


class NullReader:
    """Stands where no source exists, with the reason."""

    name = "none"
    kind = ReaderKind.NONE
    scope = Scope.DEVICE
    relative_error: float | None = None
    update_period_s = 0.0

    def __init__(self, reason: str) -> None:
        self.detail = reason

    def read(self) -> Reading:
        return Reading(energy_j=None, time_s=time.monotonic(), reason=self.detail)

    def close(self) -> None:
        pass
