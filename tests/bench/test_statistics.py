"""Intervals against known tables, and that they hold as often as they say in seeded simulated trials."""

import math
import random
import statistics

import pytest

from mxn.bench.statistics import (
    Interval,
    block_rates,
    mean_interval,
    ratio_interval,
    slope_interval,
    t95,
    verdict,
)


def test_students_t_is_that_of_the_tables() -> None:
    assert t95(1) == pytest.approx(12.706, abs=1e-3)
    assert t95(4) == pytest.approx(2.776, abs=1e-3)
    assert t95(30) == pytest.approx(2.042, abs=1e-3)
    assert t95(60) == pytest.approx(2.000, abs=2e-3)
    assert t95(1e6) == pytest.approx(1.960, abs=1e-3)


def test_interval_of_known_values() -> None:
    found = mean_interval([10, 12, 14])
    assert (found.value, found.n) == (12, 3)
    assert found.high == pytest.approx(12 + 4.3027 * 2 / math.sqrt(3), rel=1e-4)


def test_one_run_has_no_interval_and_shows_nothing() -> None:
    assert mean_interval([3.0]).low is None
    assert "nothing is shown" in verdict(ratio_interval([3.0], [4.0], is_paired=True))


def covered(trial: Interval) -> bool:
    assert trial.low is not None
    assert trial.high is not None
    return trial.low <= 1 <= trial.high


@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_two_runs_of_the_same_arm_differ_by_less_than_the_interval_says(is_paired: bool, n: int) -> None:
    """2,000 trials of the same arm against itself; 95 of 100 must cover 1. Runs share a drift when they are paired."""
    chance = random.Random(n)
    hits = 0
    for _ in range(2000):
        drift = [chance.gauss(0, 0.3) if is_paired else 0.0 for _ in range(n)]
        a = [100 * math.exp(d + chance.gauss(0, 0.03)) for d in drift]
        b = [100 * math.exp(d + chance.gauss(0, 0.03)) for d in drift]
        hits += covered(ratio_interval(a, b, is_paired=is_paired))
    assert 0.935 <= hits / 2000 <= (0.965 if is_paired else 0.985), (
        "Welch's interval is wide for few runs, never narrow"
    )


def test_a_difference_of_ten_percent_is_found_behind_a_drift_of_thirty() -> None:
    chance = random.Random(7)
    drift = [chance.gauss(0, 0.3) for _ in range(5)]
    a = [100 * math.exp(d + chance.gauss(0, 0.01)) for d in drift]
    b = [110 * math.exp(d + chance.gauss(0, 0.01)) for d in drift]
    paired = ratio_interval(a, b, is_paired=True)
    assert paired.low is not None
    assert paired.low > 1
    assert paired.value == pytest.approx(1.1, rel=0.03)
    assert "no difference shown" in verdict(ratio_interval(a, b, is_paired=False))


def test_block_means_give_honest_intervals_where_single_values_do_not() -> None:
    """Rates that depend on the moment before: blocks long against that memory cover, single values do not."""
    chance = random.Random(3)
    hits = {"blocks": 0, "values": 0}
    for _ in range(400):
        level, values = 0.0, []
        for _ in range(2000):
            level = 0.95 * level + chance.gauss(0, 1)
            values.append(100 + level)
        blocks = [statistics.fmean(values[i : i + 200]) for i in range(0, 2000, 200)]
        for name, data in (("blocks", blocks), ("values", values)):
            found = mean_interval(data)
            hits[name] += (found.low or 0) <= 100 <= (found.high or 0)
    assert hits["blocks"] / 400 >= 0.92
    assert hits["values"] / 400 <= 0.6


def test_events_are_spread_over_their_blocks() -> None:
    events = [(0.5, 2.0), (1.5, 4.0), (2.5, 6.0), (9.0, 100.0)]
    assert block_rates(events, 0, 3, 3) == [2, 4, 6]


def test_trend_is_told_from_noise() -> None:
    rising = slope_interval([1, 2.1, 2.9, 4.2, 5])
    assert rising.low is not None
    assert rising.low > 0
    flat = slope_interval([3, 3.1, 2.9, 3.05, 2.95])
    assert flat.low is not None
    assert flat.high is not None
    assert flat.low < 0 < flat.high
