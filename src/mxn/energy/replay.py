"""A recorded or scripted trace in place of a meter: known joules for tests and for replaying a measurement."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from mxn.core.clock import Clock, SystemClock
from mxn.energy.counter import CounterTracker
from mxn.energy.reader import ReaderKind, Reading, Scope


class ReplayReader:
    """Plays a counter's trace: at each moment it shows the last raw value at or before it.

    trace: (seconds since the reader was made, raw joules), in order; raw joules of None means the counter is absent
      at that time, NaN that it returns rubbish. A real counter's tick is a trace with steps.
    """

    kind = ReaderKind.REPLAY
    scope = Scope.DEVICE
    power_limit_w: float | None = None

    def __init__(
        self,
        trace: Sequence[tuple[float, float | None]],
        *,
        clock: Clock | None = None,
        name: str = "replay",
        update_period_s: float = 0.0,
        relative_error: float | None = None,
        wrap_j: float | None = None,
        freeze_after_s: float = float("inf"),
    ) -> None:
        if not trace:
            raise ValueError("a trace needs at least one (seconds, joules) point, got none")
        self.name, self.update_period_s, self.relative_error = name, update_period_s, relative_error
        self.detail = f"recorded trace of {len(trace)} points over {trace[-1][0] - trace[0][0]:g} s"
        self._clock = clock or SystemClock()
        self._start_s = self._clock.now_s()
        self._times_s = [point[0] for point in trace]
        self._values_j = [point[1] for point in trace]
        self._tracker = CounterTracker(wrap_j=wrap_j, freeze_after_s=freeze_after_s)

    def read(self) -> Reading:
        """The trace at this moment."""
        now_s = self._clock.now_s()
        index = bisect.bisect_right(self._times_s, now_s - self._start_s) - 1
        raw_j = self._values_j[max(index, 0)]
        if raw_j is None:
            return self._tracker.lost("the counter is gone", now_s)
        return self._tracker.update(raw_j, now_s)

    def close(self) -> None:
        pass


class ConstantReader:
    """A scripted chip that always draws the same watts."""

    kind = ReaderKind.REPLAY
    name = "scripted"
    scope = Scope.DEVICE
    relative_error: float | None = None
    update_period_s = 0.0
    power_limit_w: float | None = None

    def __init__(self, watts: float, *, detail: str, clock: Clock | None = None) -> None:
        self.detail = detail
        self._watts = watts
        self._clock = clock or SystemClock()
        self._start_s = self._clock.now_s()

    def read(self) -> Reading:
        """Watts times the seconds since the reader was made."""
        now_s = self._clock.now_s()
        return Reading(energy_j=self._watts * (now_s - self._start_s), time_s=now_s)

    def close(self) -> None:
        pass
