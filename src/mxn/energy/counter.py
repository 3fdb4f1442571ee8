"""Cumulative hardware counters. Wraps are undone; resets, jumps, freezes and absence are told, never summed."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise

from mxn.core.clock import Clock, SystemClock
from mxn.energy.reader import Loss, ReaderKind, Reading, Scope
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
        self._last_break: Loss | None = None

    def update(self, raw_j: float, now_s: float) -> Reading:
        """The total after seeing `raw_j` at `now_s`."""
        if not math.isfinite(raw_j) or raw_j < 0:
            return self.lost(f"the counter returned {raw_j}", now_s, Loss.NOT_A_NUMBER)
        if self._last_raw_j is None:
            self._last_raw_j, self._last_time_s, self._moved_at_s = raw_j, now_s, now_s
            return Reading(energy_j=0.0, time_s=now_s)
        step_j = raw_j - self._last_raw_j
        if step_j < 0 and self._wrap_j is not None:
            step_j += self._wrap_j
        elapsed_s = max(now_s - self._last_time_s, 1e-3)
        if step_j < 0 or step_j > MAX_PLAUSIBLE_W * max(elapsed_s, 0.1):
            self._break(Loss.WENT_BACK if step_j < 0 else Loss.JUMPED)  # nobody knows what was used in between
            step_j = 0.0
            self._moved_at_s = now_s
        elif step_j > 0:
            if self._is_frozen:
                self._break(Loss.FROZEN)
                self._is_frozen = False
                step_j = 0.0
            self._moved_at_s = now_s
        self._total_j += step_j
        self._last_raw_j, self._last_time_s = raw_j, now_s
        frozen_s = now_s - self._moved_at_s
        if frozen_s > self._freeze_after_s:
            self._is_frozen = True
            return self.lost(f"the counter has not moved for {frozen_s:.1f} s", now_s, Loss.FROZEN)
        return Reading(energy_j=self._total_j, time_s=now_s, num_breaks=self._num_breaks, last_break=self._last_break)

    def lost(self, reason: str, now_s: float, loss: Loss = Loss.GONE) -> Reading:
        """The reading for a moment at which the counter gave nothing usable."""
        return Reading(
            energy_j=None,
            time_s=now_s,
            reason=reason,
            loss=loss,
            num_breaks=self._num_breaks,
            last_break=self._last_break,
        )

    def _break(self, loss: Loss) -> None:
        self._num_breaks += 1
        self._last_break = loss


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
        power_limit_w: float | None = None,
        poll_s: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self.name, self.detail, self.scope, self.update_period_s = name, detail, scope, update_period_s
        self.power_limit_w = power_limit_w
        self._counters = list(zip(read_joules, trackers, strict=True))
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._poller = Poller(self.read, poll_s) if poll_s > 0 else None

    def read(self) -> Reading:
        """The sum of all counters; unavailable as soon as one of them is."""
        total_j, num_breaks = 0.0, 0
        lost: Reading | None = None
        last_break: Loss | None = None
        with self._lock:
            now_s = self._clock.now_s()
            for read_joules, tracker in self._counters:
                try:
                    reading = tracker.update(read_joules(), now_s)
                except (ChipError, OSError, ValueError) as err:
                    reading = tracker.lost(f"{self.name}: {err}", now_s)
                num_breaks += reading.num_breaks
                last_break = reading.last_break or last_break
                if reading.energy_j is None:
                    lost = lost or reading
                else:
                    total_j += reading.energy_j
        return Reading(
            energy_j=None if lost else total_j,
            time_s=now_s,
            reason=lost.reason if lost else None,
            loss=lost.loss if lost else None,
            num_breaks=num_breaks,
            last_break=last_break,
        )

    def close(self) -> None:
        """Stops the polling thread."""
        if self._poller:
            self._poller.stop()


def measure_tick_s(
    read_joules: Callable[[], float], *, longest_s: float, pause_s: float = 0.001, num_ticks: int = 5
) -> float | None:
    """How often a counter advances, watched until it did so `num_ticks` times or for `longest_s`.

    pause_s: sleep between two looks; 0 keeps one core busy, which a counter of an idle package needs to move.
    Returns: the median time between two advances; None when it moved less than twice.
    Raises: what `read_joules` raises.
    """
    last_j = read_joules()
    moved_at_s: list[float] = []
    end_s = time.monotonic() + longest_s
    while len(moved_at_s) <= num_ticks and (now_s := time.monotonic()) < end_s:
        joules = read_joules()
        if joules != last_j:
            last_j = joules
            moved_at_s.append(now_s)
        if pause_s:
            time.sleep(pause_s)
    if len(moved_at_s) < 2:
        return None
    return statistics.median(b - a for a, b in pairwise(moved_at_s))


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
