import os
import threading
import time
from pathlib import Path

import pytest

from mxn.core.clock import FakeClock
from mxn.energy.counter import CounterReader, CounterTracker
from mxn.energy.rapl import rapl_reader
from mxn.energy.reader import NullReader, ReaderKind
from mxn.energy.window import EnergyWindow


def zone(root: Path, folder: str, name: str, energy_uj: int, wrap_uj: int = 262_143_328_850) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{wrap_uj}\n")
    return path / "energy_uj"


class Moving:
    """Adds energy to counter files from a thread, as hardware does."""

    def __init__(self, *files: Path) -> None:
        self.files, self.stop = files, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.stop.is_set():
            for file in self.files:
                value = int(file.read_text() or 0)
                other = file.with_suffix(".new")
                other.write_text(str(value + 1000))
                os.replace(other, file)
            time.sleep(0.002)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def test_packages_and_dram_are_summed_and_parts_of_a_package_left_out(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    dram = zone(tmp_path, "intel-rapl:0:0", "dram", 7_000_000)
    zone(tmp_path, "intel-rapl:0:1", "core", 1)
    zone(tmp_path, "intel-rapl:1", "psys", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    with Moving(package, dram):
        reader = rapl_reader(root=tmp_path)
    assert reader.kind is ReaderKind.COUNTER
    assert "package-0, dram" in reader.detail
    start = reader.read().energy_j
    package.write_text(str(int(package.read_text()) + 3_000_000))
    dram.write_text(str(int(dram.read_text()) + 500_000))
    end = reader.read().energy_j
    reader.close()
    assert start is not None
    assert end is not None
    assert end - start == pytest.approx(3.5)


def test_counter_that_does_not_move_is_not_trusted(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    reader = rapl_reader(root=tmp_path, burn_s=0.01)
    assert isinstance(reader, NullReader)
    assert "does not move under load" in reader.detail


def test_absent_and_damaged_counters_are_told(tmp_path: Path) -> None:
    assert "no RAPL counters" in rapl_reader(root=tmp_path).detail
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    file.write_text("rubbish")
    assert "damaged" in rapl_reader(root=tmp_path).detail
    file.unlink()
    assert "damaged" in rapl_reader(root=tmp_path).detail


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_permission_hint_names_the_command(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0).chmod(0)
    assert "sudo chmod a+r" in rapl_reader(root=tmp_path).detail


def test_wrap_of_one_counter_leaves_the_sum_right() -> None:
    clock, values = FakeClock(), [95.0, 1000.0]
    reader = CounterReader(
        [lambda: values[0], lambda: values[1]],
        [CounterTracker(wrap_j=100), CounterTracker(wrap_j=1e6)],
        name="rapl",
        detail="",
        update_period_s=0.001,
        clock=clock,
    )
    window = EnergyWindow([reader])
    clock.advance(1)
    values[:] = [15.0, 1030.0]
    energy = window.end()
    assert energy.energy_j.value == pytest.approx(50)
    assert energy.energy_j.provenance == "measured"


def test_counter_that_vanishes_says_so() -> None:
    def gone() -> float:
        raise FileNotFoundError("energy_uj")

    clock = FakeClock()
    reader = CounterReader([gone], [CounterTracker()], name="rapl", detail="", update_period_s=0.001, clock=clock)
    reading = reader.read()
    assert reading.energy_j is None
    assert "energy_uj" in (reading.reason or "")
