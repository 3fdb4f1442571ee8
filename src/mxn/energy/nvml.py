"""NVIDIA chips: the NVML energy counter where it works, else sampled instant power. pynvml is imported on use only."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from mxn.energy.counter import CounterReader, CounterTracker
from mxn.energy.reader import NullReader, PowerReader
from mxn.energy.sampled import SampledReader
from mxn.errors import ChipError

COUNTER_TICK_S = 0.1  # NVML's energy counter advances about every 100 ms
SAMPLE_PERIOD_S = 0.05


def nvml_reader(uuid: str, *, nvml: Any = None, settle_s: float = 0.5) -> PowerReader:
    """The best reader for the board with this UUID, or a `NullReader` with the reason.

    nvml: the pynvml module; tests pass their own. settle_s: how long the counter may take to show that it moves.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return NullReader("NVML needs the Python package nvidia-ml-py: pip install 'mxn[cuda]'")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        driver = _text(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError as err:
        return NullReader(f"NVML cannot reach chip {uuid}: {err}")
    if _is_mig(nvml, handle):
        return NullReader(f"chip {uuid} is split by MIG: its board power cannot be told apart per slice")

    def guarded(call: Callable[[], float]) -> Callable[[], float]:
        def read() -> float:
            try:
                return call()
            except nvml.NVMLError as err:
                raise ChipError(f"NVML lost chip {uuid}: {err}") from err

        return read

    energy_j = guarded(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
    why_not = _why_counter_is_unusable(energy_j, settle_s)
    if why_not is None:
        return CounterReader(
            [energy_j],
            [CounterTracker(freeze_after_s=5.0)],
            name="nvml-energy",
            detail=f"NVML total energy counter of the board, driver {driver}; ticks about every {COUNTER_TICK_S:g} s",
            update_period_s=COUNTER_TICK_S,
            poll_s=1.0,
        )
    instant_w = guarded(lambda: _instant_watts(nvml, handle))
    average_w = guarded(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
    for name, what, read_watts in (
        ("nvml-instant", "instant power", instant_w),
        ("nvml-power", "power (a 1 s average on most chips since Ampere)", average_w),
    ):
        try:
            read_watts()
        except ChipError:
            continue
        return SampledReader(
            read_watts,
            name=name,
            detail=f"NVML {what} of the board every {SAMPLE_PERIOD_S:g} s, driver {driver}; no counter: {why_not}",
            period_s=SAMPLE_PERIOD_S,
            relative_error=0.05,
        )
    return NullReader(f"chip {uuid} reports neither energy nor power through NVML: {why_not}")


def _why_counter_is_unusable(energy_j: Callable[[], float], settle_s: float) -> str | None:
    """None when the counter is there and moves; an idle board draws tens of watts, so it must."""
    try:
        start_j = energy_j()
        deadline_s = time.monotonic() + settle_s
        while time.monotonic() < deadline_s:
            time.sleep(min(COUNTER_TICK_S / 4, settle_s))
            if energy_j() > start_j:
                return None
    except ChipError as err:
        return str(err)
    return f"the energy counter did not move in {settle_s:g} s"


def _instant_watts(nvml: Any, handle: Any) -> float:
    """Instant board power: field 186 with scope GPU, which PowerUsage is not on newer chips."""
    (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
    if field.nvmlReturn != nvml.NVML_SUCCESS:
        raise nvml.NVMLError(field.nvmlReturn)
    return float(field.value.uiVal) / 1e3


def _is_mig(nvml: Any, handle: Any) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return False
    return bool(current)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
