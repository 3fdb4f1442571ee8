"""Energy between two moments: joules, mean watts, tokens per watt, each with provenance or why it is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import PowerReader, ReaderKind, Reading

MAX_EDGE_ERROR = 0.2
"""A window whose ends are uncertain by more than this share of its length is refused."""

PROVENANCE = {
    ReaderKind.COUNTER: Provenance.MEASURED,
    ReaderKind.EXTERNAL: Provenance.MEASURED,
    ReaderKind.SAMPLED: Provenance.SAMPLED,
    ReaderKind.MODELLED: Provenance.ESTIMATED,
    ReaderKind.REPLAY: Provenance.SIMULATED,
    ReaderKind.NONE: Provenance.UNAVAILABLE,
}
_TRUST = list(Provenance)  # declared from most to least trustworthy


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowEnergy:
    """What a window yielded.

    energy_j, mean_watts: over all readers together; the weakest provenance among them.
    edge_error: share of the window by which its two ends are uncertain (update period / length), worst reader.
    """

    seconds: float
    energy_j: Quantity
    mean_watts: Quantity
    edge_error: float

    def tokens_per_watt(self, num_tokens: int) -> Quantity:
        """(tokens/s)/W, which is tokens per joule of the total energy, idle power included."""
        if self.energy_j.value is None:
            return Quantity.unavailable("tokens/J", self.energy_j.source)
        if num_tokens == 0:
            return Quantity.unavailable("tokens/J", "no tokens were produced in the window")
        return Quantity(
            value=num_tokens / self.energy_j.value,
            unit="tokens/J",
            provenance=self.energy_j.provenance,
            source=self.energy_j.source,
            relative_error=self.energy_j.relative_error,
        )


class EnergyWindow:
    """A stretch of time over any readers. Begins when made; `end` may be called again for a later end.

    Windows may overlap: they only look at cumulative readings and never reset a counter.
    """

    def __init__(self, readers: Sequence[PowerReader]) -> None:
        self._readers = tuple(readers)
        self._begin = tuple(reader.read() for reader in self._readers)

    def end(self) -> WindowEnergy:
        """Energy from the beginning until now."""
        ends = tuple(reader.read() for reader in self._readers)
        if not self._readers:
            return _unavailable(0.0, "no power reader")
        seconds = max(end.time_s - begin.time_s for begin, end in zip(self._begin, ends, strict=True))
        total_j, total_w, error_j, worst_edge = 0.0, 0.0, 0.0, 0.0
        for reader, begin, end in zip(self._readers, self._begin, ends, strict=True):
            edge = reader.update_period_s / (end.time_s - begin.time_s) if end.time_s > begin.time_s else math.inf
            fault = _fault(reader, begin, end, edge)
            if fault:
                return _unavailable(seconds, f"{reader.name}: {fault}")
            joules = (end.energy_j or 0.0) - (begin.energy_j or 0.0)
            total_j += joules
            total_w += joules / (end.time_s - begin.time_s)
            error_j += joules * math.hypot(reader.relative_error or 0.0, edge)
            worst_edge = max(worst_edge, edge)
        provenance = max((PROVENANCE[r.kind] for r in self._readers), key=_TRUST.index)
        source = " + ".join(f"{r.name} ({r.scope})" for r in self._readers)
        is_stated = worst_edge > 0 or any(r.relative_error is not None for r in self._readers)
        error = error_j / total_j if is_stated else None
        return WindowEnergy(
            seconds=seconds,
            energy_j=Quantity(value=total_j, unit="J", provenance=provenance, source=source, relative_error=error),
            mean_watts=Quantity(value=total_w, unit="W", provenance=provenance, source=source, relative_error=error),
            edge_error=worst_edge,
        )


def _fault(reader: PowerReader, begin: Reading, end: Reading, edge: float) -> str | None:
    """Why the two readings must not be subtracted, or None."""
    for reading in (begin, end):
        if reading.energy_j is None:
            return reading.reason or "unavailable"
    if begin.num_breaks != end.num_breaks:
        return "the source lost energy during the window (reset, jump or gap)"
    if end.time_s <= begin.time_s:
        return "the window has no length"
    if edge > MAX_EDGE_ERROR:
        return (
            f"a window of {end.time_s - begin.time_s:.3g} s is too short for a source that updates every "
            f"{reader.update_period_s:g} s: take {reader.update_period_s / MAX_EDGE_ERROR:.2g} s or more"
        )
    joules = (end.energy_j or 0.0) - (begin.energy_j or 0.0)
    if joules < 0:
        return f"the counter went back by {-joules:.3g} J"
    if joules == 0:
        return f"the counter did not move in {end.time_s - begin.time_s:.3g} s"
    return None


def _unavailable(seconds: float, reason: str) -> WindowEnergy:
    return WindowEnergy(
        seconds=seconds,
        energy_j=Quantity.unavailable("J", reason),
        mean_watts=Quantity.unavailable("W", reason),
        edge_error=math.inf,
    )
