"""Energy from a power sensor: watts sampled in a thread and integrated."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from mxn.core.clock import Clock, SystemClock
from mxn.energy.counter import MAX_PLAUSIBLE_W, Poller
from mxn.energy.reader import Loss, ReaderKind, Reading, Scope
from mxn.errors import ChipError


class PowerIntegrator:
    """Trapezoid integral of watts over time. A gap longer than `max_gap_s` is a break, never filled in."""

    def __init__(self, *, max_gap_s: float) -> None:
        self._max_gap_s = max_gap_s
        self._total_j = 0.0
        self._last: tuple[float, float] | None = None  # (watts, seconds)
        self._num_breaks = 0
        self._last_break: Loss | None = None
        self._reason: str | None = "no sample yet"
        self._loss = Loss.GAP

    def add(self, watts: float, now_s: float) -> None:
        """Takes one sample; NaN, infinite, negative and implausible ones are dropped and leave a gap."""
        if not math.isfinite(watts) or not 0 <= watts <= MAX_PLAUSIBLE_W:
            self.missed(f"the sensor returned {watts} W", Loss.NOT_A_NUMBER)
            return
        if self._last is not None:
            last_w, last_s = self._last
            gap_s = now_s - last_s
            if gap_s > self._max_gap_s:
                self._num_breaks += 1
                self._last_break = Loss.GAP
            elif gap_s > 0:
                self._total_j += 0.5 * (last_w + watts) * gap_s
        self._last, self._reason = (watts, now_s), None

    def missed(self, reason: str, loss: Loss = Loss.GONE) -> None:
        """Notes that a sample could not be taken."""
        self._reason, self._loss = reason, loss

    def reading(self, now_s: float) -> Reading:
        """Energy up to the last sample; unavailable when that is older than the longest gap."""
        if self._last is None or now_s - self._last[1] > self._max_gap_s:
            reason = self._reason or f"no sample for {now_s - (self._last or (0, now_s))[1]:.1f} s"
            loss = self._loss if self._reason else Loss.GAP
            return Reading(
                energy_j=None,
                time_s=now_s,
                reason=reason,
                loss=loss,
                num_breaks=self._num_breaks,
                last_break=self._last_break,
            )
        return Reading(
            energy_j=self._total_j, time_s=self._last[1], num_breaks=self._num_breaks, last_break=self._last_break
        )


class SampledReader:
    """A power reader that samples `read_watts` every `period_s` seconds, and once more at every reading."""

    def __init__(
        self,
        read_watts: Callable[[], float],
        *,
        name: str,
        detail: str,
        period_s: float,
        relative_error: float | None,
        scope: Scope = Scope.DEVICE,
        kind: ReaderKind = ReaderKind.SAMPLED,
        power_limit_w: float | None = None,
        clock: Clock | None = None,
        starts_thread: bool = True,
    ) -> None:
        self.kind, self.power_limit_w = kind, power_limit_w
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
