"""Power over a run: readers sampled in a thread, so that any stretch of the run can be priced afterwards."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import pairwise

from mxn.core.clock import Clock, SystemClock
from mxn.energy.counter import Poller
from mxn.energy.reader import Loss, PowerReader, Reading
from mxn.energy.window import WindowEnergy, energy_between

PERIOD_S = 0.25


class EnergyTimeline:
    """Cumulative readings of some readers, taken every `period_s` seconds until closed.

    Between two samples the energy is taken to grow evenly, so the ends of a stretch are as uncertain as a sample is
    long, or a source's own tick where that is longer.
    """

    def __init__(
        self,
        readers: Sequence[PowerReader],
        *,
        period_s: float = PERIOD_S,
        clock: Clock | None = None,
        starts_thread: bool = True,
    ) -> None:
        self._readers = tuple(readers)
        self._clock = clock or SystemClock()
        self._times_s: list[float] = []
        self._samples: list[tuple[Reading, ...]] = []
        self._poller = None
        self.sample()
        if starts_thread and self._readers:
            self._poller = Poller(self.sample, period_s)

    def sample(self) -> None:
        """Takes one sample now."""
        readings = tuple(reader.read() for reader in self._readers)
        self._samples.append(readings)
        self._times_s.append(self._clock.now_s())

    def close(self) -> None:
        """Takes a last sample and ends the thread. The readers belong to the caller."""
        if self._poller:
            self._poller.stop()
            self._poller = None
        self.sample()

    def between(self, begin_s: float, end_s: float) -> WindowEnergy:
        """Energy from one monotonic moment of the run to another; a part that was not sampled is left out."""
        columns = [[sample[i] for sample in self._samples] for i in range(len(self._readers))]
        begins = [_at(column, begin_s) for column in columns]
        ends = [_at(column, end_s) for column in columns]
        return energy_between(self._readers, begins, ends)

    def watts(self) -> list[tuple[float, float | None]]:
        """(monotonic seconds, mean watts since the sample before) over all readers; None where one could not say."""
        return [
            (now_s, _mean_watts(before, after))
            for (before, after), now_s in zip(pairwise(self._samples), self._times_s[1:], strict=True)
        ]


def _mean_watts(before: tuple[Reading, ...], after: tuple[Reading, ...]) -> float | None:
    total_w = 0.0
    for a, b in zip(before, after, strict=True):
        if a.energy_j is None or b.energy_j is None or a.num_breaks != b.num_breaks or b.time_s <= a.time_s:
            return None
        total_w += (b.energy_j - a.energy_j) / (b.time_s - a.time_s)
    return total_w


def _at(column: list[Reading], time_s: float) -> Reading:
    """The reading at a moment, from those around it."""
    index = bisect.bisect_left([reading.time_s for reading in column], time_s)
    if index == 0 or index == len(column):
        return column[min(index, len(column) - 1)]
    before, after = column[index - 1], column[index]
    if before.energy_j is None or after.energy_j is None:
        return before if before.energy_j is None else after
    if before.num_breaks != after.num_breaks:
        loss = after.last_break or Loss.GAP
        reason = f"the source lost energy around this moment ({loss.replace('_', ' ')})"
        return Reading(
            energy_j=None, time_s=time_s, reason=reason, loss=loss, num_breaks=after.num_breaks, last_break=loss
        )
    share = (time_s - before.time_s) / (after.time_s - before.time_s)
    return Reading(
        energy_j=before.energy_j + share * (after.energy_j - before.energy_j),
        time_s=time_s,
        num_breaks=before.num_breaks,
        last_break=before.last_break,
    )
