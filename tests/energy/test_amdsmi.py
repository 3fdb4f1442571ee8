"""The choice between amdsmi's energy accumulator and its power, on a scripted library."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from mxn.energy.amdsmi import amdsmi_reader
from mxn.energy.reader import NullReader, ReaderKind
from mxn.energy.window import EnergyWindow


class AmdSmiException(Exception):
    pass


class Library:
    """One chip that draws 300 W; each ability can be missing, and names differ between versions."""

    AmdSmiException = AmdSmiException

    def __init__(self, *, field: str = "energy_accumulator", moves: bool = True, power: Any = 300) -> None:
        self.field, self.moves, self.power = field, moves, power
        self.start_s = time.monotonic()
        self.is_lost = False

    def amdsmi_init(self) -> None: ...

    def amdsmi_get_processor_handles(self) -> list[int]:
        return [0, 1]

    def amdsmi_get_gpu_device_uuid(self, handle: int) -> str:
        return f"uuid-{handle}"

    def amdsmi_get_energy_count(self, handle: int) -> dict[str, Any]:
        assert handle == 1
        if self.is_lost:
            raise AmdSmiException("device lost")
        ticks = int((time.monotonic() - self.start_s) * 300e6 / 15.3) if self.moves else 7
        return {self.field: ticks, "counter_resolution": 15.3, "timestamp": 0}

    def amdsmi_get_power_info(self, handle: int) -> dict[str, Any]:
        return {"socket_power": "N/A", "current_socket_power": self.power, "average_socket_power": "N/A"}


@pytest.mark.parametrize("field", ["energy_accumulator", "power"], ids=["now", "before ROCm 6.2"])
def test_accumulator_is_preferred(field: str) -> None:
    library = Library(field=field)
    reader = amdsmi_reader("uuid-1", amdsmi=library)
    assert (reader.name, reader.kind) == ("amdsmi-energy", ReaderKind.COUNTER)
    window = EnergyWindow([reader])
    time.sleep(0.4)
    assert window.end().mean_watts.value == pytest.approx(300, rel=0.1)
    library.is_lost = True
    assert "device lost" in window.end().energy_j.source
    reader.close()


def test_power_stands_in_for_an_accumulator_that_is_stuck() -> None:
    reader = amdsmi_reader("uuid-1", amdsmi=Library(moves=False), settle_s=0.05)
    assert (reader.name, reader.kind) == ("amdsmi-power", ReaderKind.SAMPLED)
    window = EnergyWindow([reader])
    time.sleep(0.4)
    assert window.end().mean_watts.value == pytest.approx(300)
    reader.close()


def test_no_source_and_no_chip_are_null_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = amdsmi_reader("uuid-1", amdsmi=Library(moves=False, power="N/A"), settle_s=0.05)
    assert isinstance(nothing, NullReader)
    assert "neither energy nor power" in nothing.detail
    assert "knows no chip uuid-9" in amdsmi_reader("uuid-9", amdsmi=Library()).detail
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    assert "cannot be imported" in amdsmi_reader("uuid-1").detail
