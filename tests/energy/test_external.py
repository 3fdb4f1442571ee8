import sys
import time
from pathlib import Path

import pytest

from mxn.core.clock import FakeClock
from mxn.core.quantity import Provenance
from mxn.energy.external import CsvMeter, command_reader, external_reader
from mxn.energy.reader import Loss, Scope
from mxn.energy.window import EnergyWindow
from mxn.errors import ConfigError


def meter(path: Path, clock: FakeClock) -> CsvMeter:
    """A meter whose rows carry the clock's own seconds."""
    return CsvMeter(path, clock=clock, wall_s=clock.now_s, starts_thread=False)


def log(path: Path, *rows: str) -> None:
    with path.open("a") as file:
        file.write("".join(row + "\n" for row in rows))


def test_rows_that_a_logger_appends_become_energy_at_the_wall(tmp_path: Path) -> None:
    path, clock = tmp_path / "pdu.csv", FakeClock(100)
    log(path, "time,watts", "98,400", "99,400", "100,400")
    reader = meter(path, clock)
    assert reader.update_period_s == pytest.approx(1)
    window = EnergyWindow([reader])
    for second in range(101, 121):
        clock.advance(1)
        log(path, f"{second},400")
        reader.read()
    energy = window.end()
    assert energy.energy_j.value == pytest.approx(8000)
    assert energy.scope == Scope.WALL
    assert energy.energy_j.provenance is Provenance.MEASURED


def test_half_written_row_waits_for_its_end(tmp_path: Path) -> None:
    path, clock = tmp_path / "pdu.csv", FakeClock(10)
    log(path, "Timestamp, power_w", "8,100", "9,100")
    reader = meter(path, clock)
    with path.open("a") as file:
        file.write("10,1")
    before = reader.read()
    with path.open("a") as file:
        file.write("00\n")
    after = reader.read()
    assert before.energy_j == pytest.approx(100)
    assert after.energy_j == pytest.approx(200)


def test_logger_that_stops_or_writes_nan_or_vanishes_is_told(tmp_path: Path) -> None:
    path, clock = tmp_path / "pdu.csv", FakeClock(10)
    log(path, "time,watts", "9,100", "10,100")
    reader = meter(path, clock)
    window = EnergyWindow([reader])
    clock.advance(30)
    assert window.end().sources[0].loss is Loss.GAP
    log(path, "40,nan")
    assert window.end().sources[0].loss is Loss.NOT_A_NUMBER
    log(path, "40,100", "41,100")
    clock.advance(1)
    assert window.end().energy_j.value is None, "30 s without a sample must not be filled in"
    path.unlink()
    clock.advance(20)
    assert window.end().sources[0].loss is Loss.GONE


def test_iso_dates_are_times(tmp_path: Path) -> None:
    path = tmp_path / "pdu.csv"
    log(path, "date,w", "1970-01-01T00:00:01+00:00,5", "1970-01-01T00:00:03+00:00,5")
    assert meter(path, FakeClock(3)).read().energy_j == pytest.approx(10)


@pytest.mark.parametrize(
    ("spec", "words"),
    [("pdu.csv", "not a meter"), ("csv:/nowhere/pdu.csv", "cannot be read"), ("command:false", "gives no watts")],
)
def test_meter_that_cannot_be_read_is_refused_at_once(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        external_reader(spec)


def test_csv_without_a_watts_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pdu.csv"
    log(path, "time,volts")
    with pytest.raises(ConfigError, match="expected one of watts"):
        external_reader(f"csv:{path}")


def test_command_is_sampled_and_its_number_is_watts() -> None:
    reader = command_reader([sys.executable, "-c", "print('Power: 42.5 W')"], period_s=0.2)
    window = EnergyWindow([reader])
    time.sleep(1.6)
    energy = window.end()
    reader.close()
    assert energy.mean_watts.value == pytest.approx(42.5)
    assert energy.sources[0].kind == "external"
