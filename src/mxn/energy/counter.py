"""Cumulative hardware counters. Wraps are undone; resets, jumps, freezes and absence are told, never summed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from mxn.core.clock import Clock, SystemClock
from mxn.energy.reader import ReaderKind, Reading, Scope
from mxn.errors import ChipError

MAX_PLAUSIBLE_W = 20_000.0
"""More than any single chip or socket draws: a faster rise is a jump or a reset behind a wrap, not energy."""


class CounterTracker:
    """Turns raw counter values into a total that never decreases, and says when energy went missing.

    wrap_j: the counter starts again at 0 after this many joules; None when it does not wrap.
    freeze_after_s: a counter that has not moved for this long no longer counts (a chip that is on always draws power).
      Only as good as the rate at which `update` is called.
    """

    def __init__(self, *, wrap_j: float | None = None, freeze_after_s: float = math.inf) -> None:
        self._wrap_j = wrap_j
        self._freeze_after_s = freeze_after_s
        self._total_j = 0.0
        self._last_raw_j: float | None = None
        self._last_time_s = 0.0
        self._moved_at_s = 0.0
        self._is_frozen = False
        self._num_breaks = 0

    def update(self, raw_j: float, now_s: float) -> Reading:
        """The total after seeing `raw_j` at `now_s`."""
        if not math.isfinite(raw_j) or raw_j < 0:
            return self.lost(f"the counter returned {raw_j}", now_s)
        if self._last_raw_j is None:
            self._last_raw_j, self._last_time_s, self._moved_at_s = raw_j, now_s, now_s
            return Reading(energy_j=0.0, time_s=now_s)
        step_j = raw_j - self._last_raw_j
        if step_j < 0 and self._wrap_j is not None:
            step_j += self._wrap_j
        elapsed_s = max(now_s - self._last_time_s, 1e-3)
        if step_j < 0 or step_j > MAX_PLAUSIBLE_W * max(elapsed_s, 0.1):
            self._num_breaks += 1  # went backwards or jumped: nobody knows what was used in between
            step_j = 0.0
            self._moved_at_s = now_s
        elif step_j > 0:
            if self._is_frozen:
                self._num_breaks += 1
                self._is_frozen = False
                step_j = 0.0
            self._moved_at_s = now_s
        self._total_j += step_j
        self._last_raw_j, self._last_time_s = raw_j, now_s
        frozen_s = now_s - self._moved_at_s
        if frozen_s > self._freeze_after_s:
            self._is_frozen = True
            return self.lost(f"the counter has not moved for {frozen_s:.1f} s", now_s)
        return Reading(energy_j=self._total_j, time_s=now_s, num_breaks=self._num_breaks)

    def lost(self, reason: str, now_s: float) -> Reading:
        """The reading for a moment at which the counter gave nothing usable."""
        return Reading(energy_j=None, time_s=now_s, reason=reason, num_breaks=self._num_breaks)


class CounterReader:
    """A power reader over one or more hardware counters that are summed.

    read_joules: one function per counter; raises ChipError or OSError when the counter is gone.
    poll_s: a thread reads this often to catch wraps and freezes between windows; 0 starts none.
    """

    kind = ReaderKind.COUNTER
    relative_error: float | None = None

    def __init__(
        self,
        read_joules: list[Callable[[], float]],
        trackers: list[CounterTracker],
        *,
        name: str,
        detail: str,
        scope: Scope = Scope.DEVICE,
        update_period_s: float,
        poll_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self.name, self.detail, self.scope, self.update_period_s = name, detail, scope, update_period_s
        self._counters = list(zip(read_joules, trackers, strict=True))
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._poller = Poller(self.read, poll_s) if poll_s > 0 else None

    def read(self) -> Reading:
        """The sum of all counters; unavailable as soon as one of them is."""
        total_j, num_breaks, reason = 0.0, 0, None
        with self._lock:
            now_s = self._clock.now_s()
            for read_joules, tracker in self._counters:
                try:
                    reading = tracker.update(read_joules(), now_s)
                except (ChipError, OSError, ValueError) as err:
                    reading = tracker.lost(f"{self.name}: {err}", now_s)
                num_breaks += reading.num_breaks
                if reading.energy_j is None:
                    reason = reason or reading.reason
                else:
                    total_j += reading.energy_j
        return Reading(
            energy_j=None if reason else total_j,
            time_s=now_s,
            reason=reason,
            num_breaks=num_breaks,
        )

    def close(self) -> None:
        """Stops the polling thread."""
        if self._poller:
            self._poller.stop()


class Poller:
    """A daemon thread that calls a function every `period_s` seconds until stopped."""

    def __init__(self, tick: Callable[[], object], period_s: float) -> None:
        self._tick, self._period_s = tick, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mxn-energy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._tick()

    def stop(self) -> None:
        """Ends the thread. Safe to call twice."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
