"""An optional cross-check: counters of GPUs as the `zeus` library reads them. Installed by hand, imported on use."""

from __future__ import annotations

import importlib
from typing import Any

from mxn.energy.counter import CounterReader, CounterTracker, measure_tick_s
from mxn.energy.reader import Loss, NullReader, PowerReader


def zeus_reader(index: int, *, device: Any = None, settle_s: float = 0.6) -> PowerReader:
    """The board that zeus numbers `index`, or a `NullReader` with the reason. Meant to run beside mxn's own reader.

    device: the module `zeus.device`; tests pass their own.
    """
    if device is None:
        try:
            device = importlib.import_module("zeus.device")
        except ImportError as err:
            return NullReader(f"the zeus library is not installed ({err}): pip install --no-deps zeus nvidia-ml-py")
    try:
        boards = device.get_gpus()

        def energy_j() -> float:
            return float(boards.get_total_energy_consumption(index)) / 1e3

        tick_s = measure_tick_s(energy_j, longest_s=settle_s)
    except Exception as err:  # zeus has its own exceptions per vendor, and its module is not here to name them
        return NullReader(f"zeus cannot read chip {index}: {type(err).__name__}: {err}")
    if tick_s is None:
        return NullReader(f"the counter that zeus reads did not move in {settle_s:g} s", Loss.FROZEN)
    return CounterReader(
        [energy_j],
        [CounterTracker(freeze_after_s=5.0)],
        name="zeus",
        detail=f"energy counter of chip {index} through zeus; ticks every {1e3 * tick_s:.0f} ms",
        update_period_s=tick_s,
        poll_s=1.0,
    )
