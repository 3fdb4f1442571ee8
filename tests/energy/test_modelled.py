from pathlib import Path

import pytest

from mxn.core.chip import Chip
from mxn.core.clock import FakeClock
from mxn.core.quantity import Provenance
from mxn.energy.cpu import cpu_power_reader
from mxn.energy.cpu_table import CpuPower, cpu_power
from mxn.energy.modelled import ModelledCpuReader, cpu_identity
from mxn.energy.reader import ReaderKind
from mxn.energy.window import EnergyWindow

POWER = CpuPower(family="test", idle_w=1.0, max_w=5.0, source="made up", relative_error=1.0)


class ProcStat:
    """A /proc/stat whose two cores have used the given jiffies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.busy = [0, 0]
        self.idle = [0, 0]
        self.write()

    def run(self, jiffies: int, *loads: float) -> None:
        for core, load in enumerate(loads):
            self.busy[core] += round(jiffies * load)
            self.idle[core] += round(jiffies * (1 - load))
        self.write()

    def write(self) -> None:
        lines = [f"cpu{c} {self.busy[c]} 0 0 {self.idle[c]} 0 0 0 77 0 0" for c in (0, 1)]
        self.path.write_text("cpu 1 2 3\n" + "\n".join(lines) + "\nintr 0\n")


@pytest.fixture
def stat(tmp_path: Path) -> ProcStat:
    return ProcStat(tmp_path / "stat")


def test_energy_follows_utilisation_of_the_visible_cores(stat: ProcStat) -> None:
    clock = FakeClock()
    window = EnergyWindow([ModelledCpuReader(POWER, [0, 1], stat_path=stat.path, clock=clock)])
    clock.advance(10)
    stat.run(1000, 1.0, 0.5)
    energy = window.end()
    assert energy.mean_watts.value == pytest.approx(2 * (1 + 4 * 0.75))
    assert energy.energy_j.provenance is Provenance.ESTIMATED
    assert energy.energy_j.relative_error == pytest.approx(1.0, rel=0.01)


def test_a_core_that_is_not_ours_does_not_count(stat: ProcStat) -> None:
    clock = FakeClock()
    window = EnergyWindow([ModelledCpuReader(POWER, [1], stat_path=stat.path, clock=clock)])
    clock.advance(10)
    stat.run(1000, 1.0, 0.0)
    assert window.end().mean_watts.value == pytest.approx(1.0)


def test_energy_never_decreases_and_rereads_within_a_jiffy_are_free(stat: ProcStat) -> None:
    clock = FakeClock()
    reader = ModelledCpuReader(POWER, [0, 1], stat_path=stat.path, clock=clock)
    last = reader.read().energy_j or 0.0
    for i in range(50):
        clock.advance(0.004)
        if i % 3 == 0:
            stat.run(1, 1.0, 1.0)
        now = reader.read().energy_j
        assert now is not None
        assert now >= last
        last = now
    assert last == pytest.approx(10 * 0.2, rel=0.1)


def test_missing_core_or_file_is_unavailable(stat: ProcStat, tmp_path: Path) -> None:
    reading = ModelledCpuReader(POWER, [0, 9], stat_path=stat.path).read()
    assert reading.energy_j is None
    assert "1 of 2 visible cores" in (reading.reason or "")
    assert ModelledCpuReader(POWER, [0], stat_path=tmp_path / "none").read().energy_j is None


def test_every_row_has_a_source_and_sane_watts() -> None:
    for model in range(256):
        for vendor, family in (("GenuineIntel", 6), ("AuthenticAMD", 23), ("AuthenticAMD", 25), ("AuthenticAMD", 26)):
            power = cpu_power(vendor, family, model)
            assert 0 < power.idle_w < power.max_w < 15
            assert power.source


def test_unlisted_cpu_gets_a_wider_error() -> None:
    assert cpu_power("GenuineIntel", 6, 207).relative_error == 1.0
    assert cpu_power("HygonGenuine", 24, 1).relative_error == 2.0


def test_cpu_identity_of_x86_and_arm(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nflags : x\n")
    assert cpu_identity(info) == ("AuthenticAMD", 26, 2)
    info.write_text("processor : 0\nCPU implementer : 0x41\nCPU part : 0xd4f\n")
    assert cpu_identity(info) == ("arm", 0x41, 0xD4F)
    assert cpu_identity(tmp_path / "none") == ("unknown", 0, 0)


def test_cpu_power_reader_says_what_it_is_on_this_machine() -> None:
    chip = Chip(uid="cpu-0", kind=None, name="CPU", vendor="", memory_bytes=1, cores=1)
    reader = cpu_power_reader(chip)
    assert reader.kind in (ReaderKind.COUNTER, ReaderKind.MODELLED)
    if reader.kind is ReaderKind.MODELLED:
        assert "not measured: " in reader.detail
    reader.close()
