"""Any stretch of a sampled run, priced afterwards, over replayed traces with known answers."""

import math
import time

import pytest

from mxn.core.clock import FakeClock
from mxn.energy.reader import Loss, NullReader
from mxn.energy.replay import ReplayReader
from mxn.energy.timeline import EnergyTimeline

Trace = list[tuple[float, float | None]]


def run(trace: Trace, seconds: float, **options: float) -> EnergyTimeline:
    """A timeline that sampled `trace` every 0.25 s."""
    clock = FakeClock()
    timeline = EnergyTimeline([ReplayReader(trace, clock=clock, **options)], clock=clock, starts_thread=False)
    for _ in range(round(seconds / 0.25)):
        clock.advance(0.25)
        timeline.sample()
    timeline.close()
    return timeline


def two_levels() -> Trace:
    """100 W for 30 s, then 300 W, counted every 10 ms."""
    return [(t / 100, 100 * min(t / 100, 30) + 300 * max(t / 100 - 30, 0)) for t in range(6001)]


@pytest.mark.parametrize(("begin_s", "end_s", "watts"), [(0, 30, 100), (35.1, 55.3, 300), (20, 40, 200), (0, 60, 200)])
def test_any_stretch_has_its_own_power(begin_s: float, end_s: float, watts: float) -> None:
    energy = run(two_levels(), 60).between(begin_s, end_s)
    assert energy.mean_watts.value == pytest.approx(watts, rel=0.005)
    assert energy.energy_j.value == pytest.approx(watts * (end_s - begin_s), rel=0.005)
    assert energy.scope == "device"


def test_watts_over_time_show_both_levels() -> None:
    watts = run(two_levels(), 60).watts()
    assert watts[10][1] == pytest.approx(100, rel=0.05)
    assert watts[200][1] == pytest.approx(300, rel=0.05)
    assert watts[-2][0] == pytest.approx(60)


def test_stretch_around_a_reset_is_lost_and_those_beside_it_are_not() -> None:
    trace: Trace = [(t / 10, 20 * t / 10 if t < 300 else 20 * (t - 300) / 10) for t in range(601)]
    timeline = run(trace, 60)
    lost = timeline.between(20, 40)
    assert lost.energy_j.value is None
    assert lost.sources[0].loss is Loss.WENT_BACK
    assert lost.sources[0].num_gaps == 1
    assert timeline.between(1, 29).mean_watts.value == pytest.approx(20, rel=0.02)
    assert timeline.between(32, 59).mean_watts.value == pytest.approx(20, rel=0.02)


@pytest.mark.parametrize(
    ("bad", "loss"), [(None, Loss.GONE), (math.nan, Loss.NOT_A_NUMBER), (1e9, Loss.JUMPED)], ids=["gone", "nan", "jump"]
)
def test_meter_that_fails_at_the_end_of_a_stretch_gives_no_figure(bad: float | None, loss: Loss) -> None:
    trace: Trace = [(t / 10, 5.0 * t if t < 300 else bad) for t in range(601)]
    energy = run(trace, 60).between(10, 50)
    assert energy.tokens_per_watt(100).value is None
    assert energy.sources[0].loss is loss


def test_frozen_meter_gives_no_figure() -> None:
    trace: Trace = [(t / 10, 5.0 * min(t, 300)) for t in range(601)]
    energy = run(trace, 60, freeze_after_s=3).between(10, 50)
    assert energy.energy_j.value is None
    assert energy.sources[0].loss is Loss.FROZEN


def test_short_stretch_of_a_slow_counter_is_refused_with_the_length_it_needs() -> None:
    energy = run(two_levels(), 60, update_period_s=1.0).between(10, 12)
    assert energy.sources[0].loss is Loss.TOO_SHORT
    assert "take 5 s or more" in energy.energy_j.source


def test_reader_without_a_source_is_unavailable_with_its_code() -> None:
    clock = FakeClock()
    timeline = EnergyTimeline([NullReader("root only", Loss.DENIED)], clock=clock, starts_thread=False)
    clock.advance(5)
    timeline.close()
    assert timeline.between(0, 5).sources[0].loss is Loss.DENIED
    assert timeline.watts()[-1][1] is None


def test_thread_samples_by_itself() -> None:
    trace: Trace = [(t / 1000, t / 10) for t in range(2000)]
    timeline = EnergyTimeline([ReplayReader(trace)], period_s=0.02)
    time.sleep(0.3)
    timeline.close()
    assert len(timeline.watts()) >= 8
