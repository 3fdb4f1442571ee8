"""AMD chips: amdsmi's energy accumulator where it works, else sampled socket power. amdsmi is imported on use only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mxn.energy.counter import CounterReader, CounterTracker, measure_tick_s
from mxn.energy.reader import NullReader, PowerReader
from mxn.energy.sampled import SampledReader
from mxn.errors import ChipError

SAMPLE_PERIOD_S = 0.05
_POWER_FIELDS = ("socket_power", "current_socket_power", "average_socket_power")


def amdsmi_reader(uuid: str, *, amdsmi: Any = None, settle_s: float = 0.6) -> PowerReader:
    """The best reader for the chip with this UUID, or a `NullReader` with the reason.

    amdsmi: the module; tests pass their own. settle_s: how long the counter may take to show that it moves.
    """
    if amdsmi is None:
        try:
            amdsmi = importlib.import_module("amdsmi")
        except Exception as err:  # without ROCm's library the module raises KeyError
            return NullReader(f"power needs ROCm's amdsmi, which cannot be imported: {type(err).__name__}: {err}")
    try:
        amdsmi.amdsmi_init()
        handles = amdsmi.amdsmi_get_processor_handles()
        handle = next((h for h in handles if amdsmi.amdsmi_get_gpu_device_uuid(h) == uuid), None)
    except amdsmi.AmdSmiException as err:
        return NullReader(f"amdsmi cannot reach chip {uuid}: {err}")
    if handle is None:
        return NullReader(f"amdsmi knows no chip {uuid}; it sees {len(handles)} others")

    def guarded(call: Callable[[], float]) -> Callable[[], float]:
        def read() -> float:
            try:
                return call()
            except (amdsmi.AmdSmiException, KeyError) as err:
                raise ChipError(f"amdsmi lost chip {uuid}: {err}") from err

        return read

    energy_j = guarded(lambda: _joules(amdsmi.amdsmi_get_energy_count(handle)))
    try:  # an idle chip draws tens of watts, so its counter must move
        tick_s = measure_tick_s(energy_j, longest_s=settle_s)
        why_not = f"the energy counter did not move in {settle_s:g} s"
    except ChipError as err:
        tick_s, why_not = None, str(err)
    if tick_s is not None:
        return CounterReader(
            [energy_j],
            [CounterTracker(freeze_after_s=5.0)],
            name="amdsmi-energy",
            detail=f"amdsmi energy accumulator of the socket; ticks every {1e3 * tick_s:.0f} ms",
            update_period_s=tick_s,
            poll_s=1.0,
        )
    watts = guarded(lambda: _watts(amdsmi.amdsmi_get_power_info(handle)))
    try:
        watts()
    except ChipError as err:
        return NullReader(f"chip {uuid} reports neither energy nor power through amdsmi: {why_not}; {err}")
    return SampledReader(
        watts,
        name="amdsmi-power",
        detail=f"amdsmi socket power every {SAMPLE_PERIOD_S:g} s; no counter: {why_not}",
        period_s=SAMPLE_PERIOD_S,
        relative_error=0.05,
    )


def _joules(count: dict[str, Any]) -> float:
    """The accumulator, named "power" before ROCm 6.2, in steps of `counter_resolution` microjoules."""
    ticks = count["energy_accumulator"] if "energy_accumulator" in count else count["power"]
    return float(ticks) * float(count["counter_resolution"]) * 1e-6


def _watts(info: dict[str, Any]) -> float:
    """The first field that holds a number: which one does depends on the chip and on ROCm's version."""
    for name in _POWER_FIELDS:
        if isinstance(info.get(name), int | float):
            return float(info[name])
    raise KeyError(f"none of {', '.join(_POWER_FIELDS)} is a number")
