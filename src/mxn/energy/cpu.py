"""The best power reader for a CPU: RAPL, else hwmon, else the model, saying why."""

from __future__ import annotations

from mxn.core.chip import Chip
from mxn.energy.hwmon import hwmon_reader
from mxn.energy.modelled import modelled_cpu_reader
from mxn.energy.rapl import rapl_reader
from mxn.energy.reader import NullReader, PowerReader


def cpu_power_reader(chip: Chip) -> PowerReader:
    """Counters of the host that `chip` belongs to, or the modelled reader with the reason why there are none."""
    reasons = []
    for measured in (rapl_reader(), hwmon_reader("amd_energy", labels=("Esocket",))):
        if not isinstance(measured, NullReader):
            return measured
        reasons.append(measured.detail)
    modelled = modelled_cpu_reader()
    modelled.detail += f"; not measured: {'; '.join(reasons)}"
    return modelled
