"""Energy between two moments: joules, mean watts, tokens per watt, each with provenance or why it is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import Loss, PowerReader, ReaderKind, Reading, Scope

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
class SourceEnergy:
    """What one reader says of a window.

    begin_s, end_s: monotonic seconds at which its two values held. edge_error: share of the window by which these are
    uncertain (update period / length, at most 1). num_gaps: times it lost energy in between; then there are no joules.
    """

    name: str
    scope: Scope
    kind: ReaderKind
    provenance: Provenance
    begin_s: float
    end_s: float
    energy_j: float | None
    relative_error: float | None
    edge_error: float
    num_gaps: int = 0
    loss: Loss | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowEnergy:
    """What a window yielded.

    energy_j, mean_watts: over all readers together; the weakest provenance among them.
    edge_error: share of the window by which its two ends are uncertain, worst reader.
    sources: the same, reader by reader.
    """

    seconds: float
    energy_j: Quantity
    mean_watts: Quantity
    edge_error: float
    sources: tuple[SourceEnergy, ...] = ()

    @property
    def scope(self) -> str:
        """What the joules include, such as "device" or "device + wall"."""
        return " + ".join(sorted({source.scope for source in self.sources})) or "none"

    def tokens_per_watt(self, num_tokens: float) -> Quantity:
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
        return energy_between(self._readers, self._begin, [reader.read() for reader in self._readers])


def energy_between(readers: Sequence[PowerReader], begins: Sequence[Reading], ends: Sequence[Reading]) -> WindowEnergy:
    """Energy between two readings of each reader; unavailable as soon as one of them cannot say."""
    if not readers:
        return _unavailable(0.0, "no power reader", ())
    sources = tuple(_source(*three) for three in zip(readers, begins, ends, strict=True))
    seconds = max(s.end_s - s.begin_s for s in sources)
    lost = next((s for s in sources if s.energy_j is None), None)
    if lost is not None:
        return _unavailable(seconds, f"{lost.name}: {lost.reason}", sources)
    total_j = sum(s.energy_j or 0.0 for s in sources)
    total_w = sum((s.energy_j or 0.0) / (s.end_s - s.begin_s) for s in sources)
    provenance = max((s.provenance for s in sources), key=_TRUST.index)
    where = " + ".join(f"{s.name} ({s.scope})" for s in sources)
    worst_edge = max(s.edge_error for s in sources)
    is_stated = worst_edge > 0 or any(s.relative_error is not None for s in sources)
    error_j = sum((s.energy_j or 0.0) * math.hypot(s.relative_error or 0.0, s.edge_error) for s in sources)
    error = error_j / total_j if is_stated else None
    return WindowEnergy(
        seconds=seconds,
        energy_j=Quantity(value=total_j, unit="J", provenance=provenance, source=where, relative_error=error),
        mean_watts=Quantity(value=total_w, unit="W", provenance=provenance, source=where, relative_error=error),
        edge_error=worst_edge,
        sources=sources,
    )


def combine(windows: Sequence[WindowEnergy]) -> WindowEnergy:
    """Several stretches of time over the same readers as one; unavailable as soon as one of them is."""
    seconds = sum(w.seconds for w in windows)
    lost = next((w for w in windows if w.energy_j.value is None), None)
    if lost is not None or seconds == 0:
        reason = lost.energy_j.source if lost is not None else "nothing was measured"
        return _unavailable(seconds, reason, lost.sources if lost is not None else ())
    joules = sum(w.energy_j.value or 0.0 for w in windows)
    first = windows[0].energy_j
    errors = [w.energy_j.relative_error for w in windows if w.energy_j.relative_error is not None]
    error = max(errors) if errors else None

    def quantity(value: float, unit: str) -> Quantity:
        return Quantity(value=value, unit=unit, provenance=first.provenance, source=first.source, relative_error=error)

    return WindowEnergy(
        seconds=seconds,
        energy_j=quantity(joules, "J"),
        mean_watts=quantity(joules / seconds, "W"),
        edge_error=max(w.edge_error for w in windows),
        sources=windows[0].sources,
    )


def _source(reader: PowerReader, begin: Reading, end: Reading) -> SourceEnergy:
    seconds = end.time_s - begin.time_s
    edge = min(reader.update_period_s / seconds, 1.0) if seconds > 0 else 1.0
    loss, reason = _fault(reader, begin, end, edge) or (None, None)
    return SourceEnergy(
        name=reader.name,
        scope=reader.scope,
        kind=reader.kind,
        provenance=PROVENANCE[reader.kind] if loss is None else Provenance.UNAVAILABLE,
        begin_s=begin.time_s,
        end_s=end.time_s,
        energy_j=(end.energy_j or 0.0) - (begin.energy_j or 0.0) if loss is None else None,
        relative_error=reader.relative_error,
        edge_error=edge,
        num_gaps=end.num_breaks - begin.num_breaks,
        loss=loss,
        reason=reason,
    )


def _fault(reader: PowerReader, begin: Reading, end: Reading, edge: float) -> tuple[Loss, str] | None:
    """Why the two readings must not be subtracted, or None."""
    for reading in (begin, end):
        if reading.energy_j is None:
            return reading.loss or Loss.GONE, reading.reason or "unavailable"
    if begin.num_breaks != end.num_breaks:
        loss = end.last_break or Loss.GAP
        return loss, f"the source lost energy during the window ({loss.replace('_', ' ')})"
    seconds = end.time_s - begin.time_s
    if seconds <= 0:
        return Loss.TOO_SHORT, "the window has no length"
    if edge > MAX_EDGE_ERROR:
        return Loss.TOO_SHORT, (
            f"a window of {seconds:.3g} s is too short for a source that updates every "
            f"{reader.update_period_s:g} s: take {reader.update_period_s / MAX_EDGE_ERROR:.2g} s or more"
        )
    joules = (end.energy_j or 0.0) - (begin.energy_j or 0.0)
    if joules < 0:
        return Loss.WENT_BACK, f"the counter went back by {-joules:.3g} J"
    if joules == 0:
        return Loss.NO_CHANGE, f"the counter did not move in {seconds:.3g} s"
    return None


def _unavailable(seconds: float, reason: str, sources: tuple[SourceEnergy, ...]) -> WindowEnergy:
    return WindowEnergy(
        seconds=seconds,
        energy_j=Quantity.unavailable("J", reason),
        mean_watts=Quantity.unavailable("W", reason),
        edge_error=math.inf,
        sources=sources,
    )
