import math
import time

import pytest

from mxn.core.clock import FakeClock
from mxn.energy.sampled import PowerIntegrator, SampledReader
from mxn.energy.window import EnergyWindow
from mxn.errors import ChipError


def test_ramp_integrates_to_its_area() -> None:
    integrator = PowerIntegrator(max_gap_s=1)
    for i in range(101):
        integrator.add(100 + i, i * 0.1)
    assert integrator.reading(10).energy_j == pytest.approx(1500)


def test_gap_is_a_break_and_is_not_filled_in() -> None:
    integrator = PowerIntegrator(max_gap_s=1)
    integrator.add(100, 0)
    integrator.add(100, 1)
    integrator.add(100, 5)
    integrator.add(100, 6)
    reading = integrator.reading(6)
    assert reading.energy_j == pytest.approx(200)
    assert reading.num_breaks == 1


@pytest.mark.parametrize("watts", [math.nan, math.inf, -1.0, 1e9])
def test_rubbish_sample_is_dropped(watts: float) -> None:
    integrator = PowerIntegrator(max_gap_s=1)
    integrator.add(100, 0)
    integrator.add(watts, 0.5)
    integrator.add(100, 1)
    assert integrator.reading(1).energy_j == pytest.approx(100)


def test_sensor_that_vanishes_becomes_unavailable_with_the_reason() -> None:
    clock = FakeClock()
    watts: list[float] = [40.0] * 21

    def read_watts() -> float:
        if not watts:
            raise ChipError("the chip fell off the bus")
        return watts.pop()

    reader = SampledReader(
        read_watts, name="s", detail="", period_s=0.1, relative_error=0.05, clock=clock, starts_thread=False
    )
    window = EnergyWindow([reader])
    for _ in range(19):
        clock.advance(0.1)
        reader.sample()
    clock.advance(0.1)
    energy = window.end()
    assert energy.energy_j.value == pytest.approx(80)
    assert energy.energy_j.provenance == "sampled"
    clock.advance(10)
    assert "fell off the bus" in window.end().energy_j.source


def test_thread_samples_by_itself_and_stops() -> None:
    reader = SampledReader(lambda: 100.0, name="s", detail="", period_s=0.01, relative_error=None)
    window = EnergyWindow([reader])
    time.sleep(0.15)
    assert window.end().mean_watts.value == pytest.approx(100)
    reader.close()
    reader.close()
