"""CPU energy computed from utilisation, for machines where nothing measures it. Always marked as estimated."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from mxn.core.clock import Clock, SystemClock
from mxn.energy.cpu_table import CpuPower, cpu_power
from mxn.energy.reader import Loss, ReaderKind, Reading, Scope

JIFFY_S = 0.01
"""Resolution of /proc/stat on every common kernel (USER_HZ = 100)."""


class ModelledCpuReader:
    """Energy = seconds x cores x (idle + (full load - idle) x utilisation), utilisation from /proc/stat.

    cores: indices of the cores that this process may use; their share of the package is what is counted.
    relative_error: that of the table row; 1.0 means within a factor of two. Good for ranking configurations on one
      machine, not for ranking chips.
    """

    name = "modelled-cpu"
    kind = ReaderKind.MODELLED
    scope = Scope.DEVICE
    update_period_s = JIFFY_S
    power_limit_w: float | None = None

    def __init__(
        self, power: CpuPower, cores: Sequence[int], *, stat_path: Path = Path("/proc/stat"), clock: Clock | None = None
    ) -> None:
        self.relative_error: float | None = power.relative_error
        self.detail = (
            f"{len(cores)} cores x {power.idle_w:.2f} to {power.max_w:.2f} W by utilisation, memory not counted, "
            f"within a factor of {1 + power.relative_error:g} ({power.family}: {power.source})"
        )
        self._power = power
        self._names = frozenset(f"cpu{core}" for core in cores)
        self._stat_path = stat_path
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._total_j = 0.0
        self._num_breaks = 0
        self._last: tuple[float, float, float] | None = None  # (busy jiffies, all jiffies, seconds)

    def read(self) -> Reading:
        """Energy since the first reading."""
        with self._lock:
            now_s = self._clock.now_s()
            try:
                busy, total = self._jiffies()
            except (OSError, ValueError) as err:
                reason = f"{self._stat_path}: {err}"
                return Reading(energy_j=None, time_s=now_s, reason=reason, loss=Loss.GONE, num_breaks=self._num_breaks)
            if self._last is not None:
                last_busy, last_total, last_s = self._last
                if busy < last_busy or total < last_total:
                    self._num_breaks += 1
                else:
                    # Within one jiffy nothing is known of the load: charge it with the next one.
                    if total == last_total:
                        return self._reading(last_s)
                    load = (busy - last_busy) / (total - last_total)
                    watts = self._power.idle_w + (self._power.max_w - self._power.idle_w) * load
                    self._total_j += watts * len(self._names) * (now_s - last_s)
            self._last = (busy, total, now_s)
            return self._reading(now_s)

    def close(self) -> None:
        pass

    def _reading(self, time_s: float) -> Reading:
        last_break = Loss.WENT_BACK if self._num_breaks else None
        return Reading(energy_j=self._total_j, time_s=time_s, num_breaks=self._num_breaks, last_break=last_break)

    def _jiffies(self) -> tuple[float, float]:
        """(busy, busy + idle) jiffies summed over the cores; time stolen by other guests is in neither."""
        busy = total = 0.0
        num_found = 0
        for line in self._stat_path.read_text().splitlines():
            name, *fields = line.split()
            if name not in self._names:
                continue
            user, nice, system, idle, iowait, irq, softirq = (float(f) for f in fields[:7])
            busy += user + nice + system + irq + softirq
            total += user + nice + system + irq + softirq + idle + iowait
            num_found += 1
        if num_found != len(self._names):
            raise ValueError(f"shows {num_found} of {len(self._names)} visible cores")
        return busy, total


def modelled_cpu_reader(*, cpuinfo_path: Path = Path("/proc/cpuinfo"), clock: Clock | None = None) -> ModelledCpuReader:
    """The modelled reader for the CPU this process runs on."""
    vendor, family, model = cpu_identity(cpuinfo_path)
    return ModelledCpuReader(cpu_power(vendor, family, model), sorted(os.sched_getaffinity(0)), clock=clock)


def cpu_identity(cpuinfo_path: Path = Path("/proc/cpuinfo")) -> tuple[str, int, int]:
    """(vendor, family, model) as CPUID gives them; on Arm ("arm", implementer, part); zeros when unknown."""
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo_path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return "unknown", 0, 0
    try:
        if "CPU implementer" in fields:
            return "arm", int(fields["CPU implementer"], 0), int(fields.get("CPU part", "0"), 0)
        return fields.get("vendor_id", "unknown"), int(fields.get("cpu family", "0")), int(fields.get("model", "0"))
    except ValueError:
        return fields.get("vendor_id", "unknown"), 0, 0
