"""The best power reader for a CPU: RAPL where it can be read, else the model, saying why."""

from __future__ import annotations

from mxn.core.chip import Chip
from mxn.energy.modelled import modelled_cpu_reader
from mxn.energy.rapl import rapl_reader
from mxn.energy.reader import NullReader, PowerReader


def cpu_power_reader(chip: Chip) -> PowerReader:
    """RAPL counters of the host that `chip` belongs to, or the modelled reader with the reason why there are none."""
    measured = rapl_reader()
    if not isinstance(measured, NullReader):
        return measured
    modelled = modelled_cpu_reader()
    modelled.detail += f"; not measured: {measured.detail}"
    return modelled
