"""The choice between NVML's counter, instant power and averaged power, on a scripted driver."""

import sys
import time
from types import SimpleNamespace

import pytest

from mxn.energy.nvml import nvml_reader
from mxn.energy.reader import NullReader, ReaderKind
from mxn.energy.window import EnergyWindow


class NVMLError(Exception):
    pass


class Driver:
    """A driver with one board; each ability can be missing."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_FI_DEV_POWER_INSTANT = 186

    def __init__(self, *, counter: bool = True, moves: bool = True, instant: bool = True, power: bool = True) -> None:
        self.counter, self.moves, self.instant, self.power = counter, moves, instant, power
        self.mig = 0
        self.is_lost = False
        self.start_s = time.monotonic()

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        return self.mig, self.mig

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.is_lost:
            raise NVMLError("GPU is lost")
        if not self.counter:
            raise NVMLError("Not Supported")
        return 1_000_000 + (int((time.monotonic() - self.start_s) * 200_000) if self.moves else 0)

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[SimpleNamespace]:
        assert fields == [186]
        return [SimpleNamespace(nvmlReturn=0 if self.instant else 3, value=SimpleNamespace(uiVal=150_000))]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if not self.power:
            raise NVMLError("Not Supported")
        return 140_000


def test_counter_is_preferred() -> None:
    driver = Driver()
    reader = nvml_reader("GPU-1", nvml=driver)
    assert (reader.name, reader.kind) == ("nvml-energy", ReaderKind.COUNTER)
    assert reader.power_limit_w == 700
    window = EnergyWindow([reader])
    time.sleep(0.6)
    assert window.end().mean_watts.value == pytest.approx(200, rel=0.1)
    driver.is_lost = True
    assert "GPU is lost" in window.end().energy_j.source
    reader.close()


@pytest.mark.parametrize("driver", [Driver(counter=False), Driver(moves=False)], ids=["absent", "stuck"])
def test_instant_power_stands_in_for_a_counter_that_is_absent_or_stuck(driver: Driver) -> None:
    reader = nvml_reader("GPU-1", nvml=driver, settle_s=0.05)
    assert (reader.name, reader.kind) == ("nvml-instant", ReaderKind.SAMPLED)
    assert "no counter" in reader.detail
    window = EnergyWindow([reader])
    time.sleep(0.4)
    assert window.end().mean_watts.value == pytest.approx(150)
    reader.close()


def test_averaged_power_is_the_last_resort() -> None:
    reader = nvml_reader("GPU-1", nvml=Driver(counter=False, instant=False), settle_s=0.05)
    assert reader.name == "nvml-power"
    assert "average" in reader.detail
    reader.close()


def test_no_source_no_board_and_mig_are_null_with_the_reason() -> None:
    nothing = nvml_reader("GPU-1", nvml=Driver(counter=False, instant=False, power=False), settle_s=0.05)
    assert isinstance(nothing, NullReader)
    assert "Not Supported" in nothing.detail
    assert "Not Found" in nvml_reader("GPU-2", nvml=Driver()).detail
    split = Driver()
    split.mig = 1
    assert "MIG" in nvml_reader("GPU-1", nvml=split).detail


def test_absent_binding_is_null_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install" in nvml_reader("GPU-1").detail
