"""Windows over replayed traces with known answers, and over traces that misbehave."""

import math

import pytest

from mxn.core.clock import FakeClock
from mxn.core.quantity import Provenance
from mxn.energy.reader import NullReader
from mxn.energy.replay import ReplayReader
from mxn.energy.window import EnergyWindow


def steady(watts: float, seconds: float, tick_s: float = 0.1, offset_j: float = 0.0) -> list[tuple[float, float]]:
    """A counter at constant power that advances every `tick_s`."""
    return [(i * tick_s, offset_j + watts * i * tick_s) for i in range(round(seconds / tick_s) + 1)]


def test_steady_power_gives_its_joules_watts_and_tokens_per_watt() -> None:
    clock = FakeClock()
    window = EnergyWindow([ReplayReader(steady(50, 20), clock=clock, update_period_s=0.1)])
    clock.advance(10)
    energy = window.end()
    assert energy.energy_j.value == pytest.approx(500, rel=1e-3)
    assert energy.mean_watts.value == pytest.approx(50, rel=1e-3)
    assert energy.tokens_per_watt(2000).value == pytest.approx(4.0, rel=1e-3)
    assert energy.tokens_per_watt(2000).unit == "tokens/J"
    assert energy.energy_j.provenance is Provenance.SIMULATED
    assert energy.edge_error == pytest.approx(0.01)
    assert energy.energy_j.relative_error == pytest.approx(0.01)


def test_edge_error_bounds_the_real_error_for_every_phase() -> None:
    for phase in range(25):
        clock = FakeClock()
        reader = ReplayReader(steady(300, 30), clock=clock, update_period_s=0.1)
        clock.advance(phase * 0.0137)
        window = EnergyWindow([reader])
        clock.advance(1.0 + phase * 0.031)
        energy = window.end()
        true_j = 300 * (1.0 + phase * 0.031)
        assert energy.energy_j.value is not None
        assert abs(energy.energy_j.value - true_j) / true_j <= energy.edge_error + 1e-9


def test_overlapping_windows_see_each_its_own_stretch() -> None:
    clock = FakeClock()
    reader = ReplayReader(steady(10, 100), clock=clock)
    first = EnergyWindow([reader])
    clock.advance(5)
    second = EnergyWindow([reader])
    clock.advance(5)
    assert first.end().energy_j.value == pytest.approx(100)
    clock.advance(10)
    assert second.end().energy_j.value == pytest.approx(150)
    assert first.end().energy_j.value == pytest.approx(200)


def test_several_readers_are_summed() -> None:
    clock = FakeClock()
    window = EnergyWindow([ReplayReader(steady(10, 20), clock=clock), ReplayReader(steady(30, 20), clock=clock)])
    clock.advance(10)
    assert window.end().mean_watts.value == pytest.approx(40)


def test_wrap_around_is_undone() -> None:
    clock = FakeClock()
    trace = [(t, (90.0 + 10 * t) % 100) for t in range(8)]
    reader = ReplayReader(trace, clock=clock, wrap_j=100)
    window = EnergyWindow([reader])
    for _ in range(5):
        clock.advance(1)
        reader.read()
    assert window.end().energy_j.value == pytest.approx(50)


def test_too_short_window_is_refused_with_what_to_do() -> None:
    clock = FakeClock()
    window = EnergyWindow([ReplayReader(steady(50, 2), clock=clock, update_period_s=0.1)])
    clock.advance(0.2)
    energy = window.end().energy_j
    assert energy.value is None
    assert "too short" in energy.source
    assert "take 0.5 s or more" in energy.source


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        ([(0, 100.0), (1, 110.0), (2, 5.0), (3, 15.0)], "lost energy"),
        ([(0, 100.0), (3, 100.0)], "did not move"),
        ([(0, 100.0), (2.5, math.nan)], "returned nan"),
        ([(0, 100.0), (2.5, math.inf)], "returned inf"),
        ([(0, 100.0), (2.5, -7.0)], "returned -7"),
        ([(0, 100.0), (2.5, None)], "is gone"),
        ([(0, None), (2.5, 100.0)], "is gone"),
        ([(0, 100.0), (2.5, 1e9)], "lost energy"),
    ],
    ids=["backwards", "frozen", "nan", "infinite", "negative", "vanished", "absent-at-start", "jump"],
)
def test_misbehaving_counter_gives_no_figure(trace: list[tuple[float, float | None]], reason: str) -> None:
    clock = FakeClock()
    reader = ReplayReader(trace, clock=clock)
    window = EnergyWindow([reader])
    for _ in range(3):
        clock.advance(1)
        reader.read()
    energy = window.end()
    for quantity in (energy.energy_j, energy.mean_watts, energy.tokens_per_watt(100)):
        assert quantity.value is None
        assert quantity.provenance is Provenance.UNAVAILABLE
        assert reason in quantity.source


def test_counter_that_freezes_half_way_is_noticed_and_recovers() -> None:
    clock = FakeClock()
    trace: list[tuple[float, float | None]] = [(t, 10.0 * min(t, 5)) for t in range(16)]
    trace += [(t, 10.0 * (t - 10)) for t in range(16, 40)]
    reader = ReplayReader(trace, clock=clock, freeze_after_s=3)

    def run(seconds: int) -> None:
        for _ in range(seconds):
            clock.advance(1)
            reader.read()

    window = EnergyWindow([reader])
    run(10)
    assert "has not moved for 5.0 s" in window.end().energy_j.source
    run(10)
    assert "lost energy" in window.end().energy_j.source
    later = EnergyWindow([reader])
    run(10)
    assert later.end().mean_watts.value == pytest.approx(10)


def test_no_reader_and_null_reader_are_unavailable_never_zero() -> None:
    assert EnergyWindow([]).end().energy_j.value is None
    energy = EnergyWindow([NullReader("the driver is missing")]).end()
    assert energy.energy_j.value is None
    assert "the driver is missing" in energy.tokens_per_watt(10).source


def test_one_unavailable_reader_makes_the_sum_unavailable() -> None:
    clock = FakeClock()
    window = EnergyWindow([ReplayReader(steady(10, 20), clock=clock), NullReader("no counter")])
    clock.advance(10)
    assert window.end().energy_j.value is None


def test_no_tokens_means_no_tokens_per_watt() -> None:
    clock = FakeClock()
    window = EnergyWindow([ReplayReader(steady(10, 20), clock=clock)])
    clock.advance(10)
    assert window.end().tokens_per_watt(0).value is None
