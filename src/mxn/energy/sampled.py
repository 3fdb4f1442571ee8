"""Energy from a power sensor: watts sampled in a thread and integrated."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from mxn.core.clock import Clock, SystemClock
from mxn.energy.counter import MAX_PLAUSIBLE_W, Poller
from mxn.energy.reader import ReaderKind, Reading, Scope
from mxn.errors import ChipError


class PowerIntegrator:
    """Trapezoid integral of watts over time. A gap longer than `max_gap_s` is a break, never filled in."""

    def __init__(self, *, max_gap_s: float) -> None:
        self._max_gap_s = max_gap_s
        self._total_j = 0.0
        self._last: tuple[float, float] | None = None  # (watts, seconds)
        self._num_breaks = 0
        self._reason: str | None = "no sample yet"

    def add(self, watts: float, now_s: float) -> None:
        """Takes one sample; NaN, infinite, negative and implausible ones are dropped and leave a gap."""
        if not math.isfinite(watts) or not 0 <= watts <= MAX_PLAUSIBLE_W:
            self._reason = f"the sensor returned {watts} W"
            return
        if self._last is not None:
            last_w, last_s = self._last
            gap_s = now_s - last_s
            if gap_s > self._max_gap_s:
                self._num_breaks += 1
            elif gap_s > 0:
                self._total_j += 0.5 * (last_w + watts) * gap_s
        self._last, self._reason = (watts, now_s), None

    def missed(self, reason: str) -> None:
        """Notes that a sample could not be taken."""
        self._reason = reason

    def reading(self, now_s: float) -> Reading:
        """Energy up to the last sample; unavailable when that is older than the longest gap."""
        if self._last is None or now_s - self._last[1] > self._max_gap_s:
            reason = self._reason or f"no sample for {now_s - (self._last or (0, now_s))[1]:.1f} s"
            return Reading(energy_j=None, time_s=now_s, reason=reason, num_breaks=self._num_breaks)
        return Reading(energy_j=self._total_j, time_s=self._last[1], num_breaks=self._num_breaks)


class SampledReader:
    """A power reader that samples `read_watts` every `period_s` seconds, and once more at every reading."""

    kind = ReaderKind.SAMPLED

    def __init__(
        self,
        read_watts: Callable[[], float],
        *,
        name: str,
        detail: str,
        period_s: float,
        relative_error: float | None,
        scope: Scope = Scope.DEVICE,
        clock: Clock | None = None,
        starts_thread: bool = True,
    ) -> None:
        self.name, self.detail, self.scope, self.relative_error = name, detail, scope, relative_error
        self.update_period_s = period_s
        self._read_watts = read_watts
        self._clock = clock or SystemClock()
        self._integrator = PowerIntegrator(max_gap_s=max(1.0, 20 * period_s))
        self._lock = threading.Lock()
        self._poller = Poller(self.sample, period_s) if starts_thread else None

    def sample(self) -> None:
        """Takes one sample now."""
        with self._lock:
            try:
                self._integrator.add(self._read_watts(), self._clock.now_s())
            except (ChipError, OSError, ValueError) as err:
                self._integrator.missed(f"{self.name}: {err}")

    def read(self) -> Reading:
        """Energy integrated so far."""
        self.sample()
        with self._lock:
            return self._integrator.reading(self._clock.now_s())

    def close(self) -> None:
        """Stops the sampling thread."""
        if self._poller:
            self._poller.stop()
