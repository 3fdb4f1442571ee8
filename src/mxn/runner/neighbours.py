"""What other processes take of the cores that this one may run on. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil


def watch_others() -> Callable[[], float]:
    """Begins to watch this process's cores; the answer says what share of their time others have taken since."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)

    def busy_s() -> float:
        of_cores = psutil.cpu_times(percpu=True)
        used = [of_cores[core] for core in cores if core < len(of_cores)]
        return sum(
            sum(t) - t.idle - getattr(t, "iowait", 0) - getattr(t, "guest", 0) - getattr(t, "guest_nice", 0)
            for t in used
        )

    began_s, began_busy_s, began_own_s = time.perf_counter(), busy_s(), time.process_time()

    def share() -> float:
        spent_s = max(time.perf_counter() - began_s, 1e-3) * len(cores)
        return max(0.0, busy_s() - began_busy_s - (time.process_time() - began_own_s)) / spent_s

    return share
