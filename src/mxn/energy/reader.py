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


class Loss(StrEnum):
    """Why energy is not known, for programs; the sentence beside it is for people."""

    ABSENT = "absent"  # there is no such source here
    DENIED = "denied"  # it is there and may not be read
    SHARED = "shared"  # it covers more than the chip in question, as with MIG
    GONE = "gone"  # it was there and stopped answering
    NOT_A_NUMBER = "not_a_number"
    WENT_BACK = "went_back"
    JUMPED = "jumped"
    FROZEN = "frozen"
    GAP = "gap"  # no sample for too long
    TOO_SHORT = "too_short"  # the window is too short for the source's tick
    NO_CHANGE = "no_change"  # the counter shows nothing for the window


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Cumulative energy at one moment.

    energy_j: joules since an arbitrary start, never decreasing; None when unavailable (`reason` and `loss` say why).
    time_s: monotonic seconds at which the value held.
    num_breaks: times the source lost energy so far (reset, jump, gap), the newest being `last_break`. Two readings may
      be subtracted only when their numbers are equal.
    """

    energy_j: float | None
    time_s: float
    reason: str | None = None
    loss: Loss | None = None
    num_breaks: int = 0
    last_break: Loss | None = None


class PowerReader(Protocol):
    """A source of cumulative energy for one scope.

    name: short, shown beside every figure ("nvml-energy", "rapl-package", "modelled-cpu", "none").
    detail: one sentence: what is read, from where, and its limits.
    relative_error: 1.0 means within a factor of two; None when the source states none.
    update_period_s: how stale a value may be; a window's edge error is this over its length. 0 when always current.
      Counters measure it when they are opened.
    power_limit_w: the cap that the chip is set to; None when unknown. mxn reads it and never changes it.
    """

    name: str
    kind: ReaderKind
    scope: Scope
    detail: str
    relative_error: float | None
    update_period_s: float
    power_limit_w: float | None

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
    power_limit_w: float | None = None

    def __init__(self, reason: str, loss: Loss = Loss.ABSENT) -> None:
        self.detail = reason
        self.loss = loss

    def read(self) -> Reading:
        return Reading(energy_j=None, time_s=time.monotonic(), reason=self.detail, loss=self.loss)

    def close(self) -> None:
        pass
