"""Whether a board's energy counter can be trusted: does it count, how often, does it agree with the power sensor.

    python benchmarks/energy_gpu.py --out results.json
    python benchmarks/energy_gpu.py --dry-run            with a scripted board, in two seconds

Idle watts by counter and by instant power; then a matrix product runs for 30 s while instant power is sampled, and the
integral is compared with the counter. NVIDIA boards only: amdsmi has no instant power beside its counter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from chip_facts import stamp  # noqa: E402

from mxn.energy.counter import measure_tick_s  # noqa: E402
from mxn.energy.sampled import PowerIntegrator  # noqa: E402

PERIOD_S = 0.02  # between samples of instant power
AGREEMENT = 0.05  # how far counter and integral may be apart


class ScriptedBoard:
    """NVML for a board that draws 80 W idle and 500 W under load, and counts in steps of 20 ms."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_POWER_INSTANT = 186

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.is_loaded = False
        self._joules, self._last_s = 0.0, time.monotonic()

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "scripted board"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        now_s = time.monotonic()
        if now_s - self._last_s >= 0.02:
            self._joules += self._watts() * (now_s - self._last_s)
            self._last_s = now_s
        return int(self._joules * 1e3)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:
        value = SimpleNamespace(uiVal=int(self._watts() * 1e3))
        return [SimpleNamespace(nvmlReturn=0, value=value)]

    def _watts(self) -> float:
        return 500.0 if self.is_loaded else 80.0


def check_energy(nvml: Any, load: Callable[[threading.Event], None], *, idle_s: float, load_s: float) -> dict[str, Any]:
    """Args: load: keeps the chip busy until the event is set."""
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)

    def energy_j() -> float:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

    def instant_w() -> float:
        (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        if field.nvmlReturn != nvml.NVML_SUCCESS:
            raise nvml.NVMLError(field.nvmlReturn)
        return field.value.uiVal / 1e3

    facts: dict[str, Any] = {"board": str(nvml.nvmlDeviceGetName(handle))}
    facts["counter_tick_s"] = measure_tick_s(energy_j, longest_s=2.0)
    for name, seconds, work in (("idle", idle_s, None), ("load", load_s, load)):
        stop = threading.Event()
        thread = threading.Thread(target=work, args=(stop,), daemon=True) if work else None
        if thread:
            thread.start()
            time.sleep(min(1.0, seconds / 5))  # clocks and power settle
        facts[name] = _window(energy_j, instant_w, seconds)
        stop.set()
        if thread:
            thread.join(30)
    ratio = facts["load"]["counter_j"] / facts["load"]["integral_j"]
    facts |= {"counter_over_integral": ratio, "allowed_difference": AGREEMENT, "agrees": abs(ratio - 1) <= AGREEMENT}
    return facts


def _window(energy_j: Callable[[], float], instant_w: Callable[[], float], seconds: float) -> dict[str, float]:
    """Joules by counter, from one of its steps to another, and by integral of samples over the same time."""
    integrator, samples = PowerIntegrator(max_gap_s=1.0), []
    begin_j = _next_step(energy_j)
    begin_s = time.monotonic()
    while (now_s := time.monotonic()) < begin_s + seconds:
        samples.append(instant_w())
        integrator.add(samples[-1], now_s)
        time.sleep(PERIOD_S)
    end_j = _next_step(energy_j)
    end_s = time.monotonic()
    integrator.add(instant_w(), end_s)
    counted, integral = end_j - begin_j, integrator.reading(end_s).energy_j
    return {
        "seconds": end_s - begin_s,
        "counter_j": counted,
        "counter_w": counted / (end_s - begin_s),
        "integral_j": integral,
        "instant_median_w": statistics.median(samples),
        "samples": len(samples),
    }


def _next_step(energy_j: Callable[[], float]) -> float:
    """The counter right after it moved; raises when it does not."""
    before = energy_j()
    deadline_s = time.monotonic() + 2
    while (now_j := energy_j()) == before:
        if time.monotonic() > deadline_s:
            raise RuntimeError("the energy counter did not move in 2 s")
        time.sleep(0.001)
    return now_j


def multiply(stop: threading.Event) -> None:
    """Matrix products until told to stop, a few in flight at a time."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    while not stop.is_set():
        for _ in range(8):
            left @ right
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write everything as JSON to this file")
    parser.add_argument("--dry-run", action="store_true", help="with a scripted board")
    options = parser.parse_args()
    if options.dry_run:
        board = ScriptedBoard()

        def load(stop: threading.Event) -> None:
            board.is_loaded = True
            stop.wait()
            board.is_loaded = False

        facts = check_energy(board, load, idle_s=0.3, load_s=0.6)
    else:
        facts = check_energy(importlib.import_module("pynvml"), multiply, idle_s=4.0, load_s=30.0)
    print(json.dumps(facts, indent=1))
    if options.out:
        report = {**stamp("cpu" if options.dry_run else "cuda"), "is_dry_run": options.dry_run, "energy": facts}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if facts["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
