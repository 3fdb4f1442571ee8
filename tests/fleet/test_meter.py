"""What the meter learns from counters of a replica whose steps are known."""

from __future__ import annotations

import random

import pytest

from mxn.engine.stats import EngineStats
from mxn.fleet.meter import Meter


def test_price_of_a_token_and_capacity_are_found_whatever_the_mix_of_steps() -> None:
    rng = random.Random(0)
    meter, stats = Meter(), EngineStats()
    for _ in range(400):
        tokens = rng.choice([1, 4, 8, 200, 512])
        stats.num_steps += 1
        stats.num_computed_tokens += tokens
        stats.busy_s += (0.02 + 0.0005 * tokens) * rng.uniform(0.95, 1.05)
        meter.note(stats)
    assert meter.prompt_token_s == pytest.approx(0.0005, rel=0.2)
    assert meter.tokens_per_s is not None
    assert 500 < meter.tokens_per_s < 512 / (0.02 + 0.0005 * 512)


def test_equal_steps_tell_no_price() -> None:
    meter, stats = Meter(), EngineStats()
    for _ in range(100):
        stats.num_steps += 1
        stats.num_computed_tokens += 8
        stats.busy_s += 0.02
        meter.note(stats)
    assert meter.prompt_token_s is None
    assert meter.tokens_per_s == pytest.approx(400)


def test_a_slow_hour_does_not_take_the_capacity_away_at_once() -> None:
    meter, stats = Meter(), EngineStats()
    for rate in (1000.0, 10.0, 10.0):
        stats.num_steps += 1
        stats.num_computed_tokens += int(rate)
        stats.busy_s += 1.0
        meter.note(stats)
    assert meter.tokens_per_s == pytest.approx(1000 * 0.98**2)


def test_joules_and_lengths_are_those_of_finished_work() -> None:
    meter = Meter()
    meter.note(EngineStats(busy_s=1.0, num_steps=9, num_computed_tokens=400, num_output_tokens=200, num_finished=4))
    assert (meter.mean_output_tokens, meter.joules_per_token) == (50, None)
    meter.note(
        EngineStats(
            busy_s=2.0,
            num_steps=19,
            num_computed_tokens=800,
            num_output_tokens=400,
            num_finished=8,
            request_energy_j=100.0,
        )
    )
    assert meter.joules_per_token == pytest.approx(0.25)
