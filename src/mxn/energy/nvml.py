"""NVIDIA chips: the NVML energy counter where it works, else sampled instant power. pynvml is imported on use only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mxn.energy.counter import CounterReader, CounterTracker, measure_tick_s
from mxn.energy.reader import Loss, NullReader, PowerReader
from mxn.energy.sampled import SampledReader
from mxn.errors import ChipError

SAMPLE_PERIOD_S = 0.05


def nvml_reader(uuid: str, *, nvml: Any = None, settle_s: float = 0.6) -> PowerReader:
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
        return NullReader(f"chip {uuid} is split by MIG: its board power cannot be told apart per slice", Loss.SHARED)

    def guarded(call: Callable[[], float]) -> Callable[[], float]:
        def read() -> float:
            try:
                return call()
            except nvml.NVMLError as err:
                raise ChipError(f"NVML lost chip {uuid}: {err}") from err

        return read

    energy_j = guarded(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
    limit_w = _power_limit_w(nvml, handle)
    try:  # an idle board draws tens of watts, so its counter must move
        tick_s = measure_tick_s(energy_j, longest_s=settle_s)
        why_not = f"the energy counter did not move in {settle_s:g} s"
    except ChipError as err:
        tick_s, why_not = None, str(err)
    if tick_s is not None:
        return CounterReader(
            [energy_j],
            [CounterTracker(freeze_after_s=5.0)],
            name="nvml-energy",
            detail=f"NVML total energy counter of the board, driver {driver}; ticks every {1e3 * tick_s:.0f} ms",
            update_period_s=tick_s,
            power_limit_w=limit_w,
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
            power_limit_w=limit_w,
        )
    return NullReader(f"chip {uuid} reports neither energy nor power through NVML: {why_not}")


def _instant_watts(nvml: Any, handle: Any) -> float:
    """Instant board power: field 186 with scope GPU, which PowerUsage is not on newer chips."""
    (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
    if field.nvmlReturn != nvml.NVML_SUCCESS:
        raise nvml.NVMLError(field.nvmlReturn)
    return float(field.value.uiVal) / 1e3


def _power_limit_w(nvml: Any, handle: Any) -> float | None:
    """The cap in force; None where the driver does not tell."""
    try:
        return float(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1e3
    except nvml.NVMLError:
        return None


def _is_mig(nvml: Any, handle: Any) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return False
    return bool(current)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
