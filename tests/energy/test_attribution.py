"""Joules of requests and idle against a replayed meter: nothing is lost, and who costs more pays more."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.core.batch import SequenceStep, StepBatch
from mxn.core.clock import FakeClock
from mxn.core.request import SamplingParams
from mxn.energy.attribution import StepCost, StepLedger
from mxn.energy.reader import NullReader
from mxn.energy.replay import ReplayReader

GREEDY = SamplingParams()
Row = tuple[int, int, int]
"""(sequence, new tokens, context before them)"""


def batch(rows: list[Row]) -> StepBatch:
    steps = [
        SequenceStep(
            seq_id=seq_id,
            token_ids=range(num_tokens),
            start=start,
            block_ids=(),
            is_sampled=True,
            sampling=GREEDY,
            seed=0,
            num_prompt_tokens=1,
            num_output_tokens=int(num_tokens == 1),
        )
        for seq_id, num_tokens, start in rows
    ]
    return StepBatch(step_id=0, sequences=tuple(steps))


class Bench:
    """A ledger on a scripted meter whose watts depend on whether a step runs."""

    def __init__(self, *, tick_s: float = 0.01, busy_w: float = 200, idle_w: float = 50, seconds: float = 3600) -> None:
        self.clock = FakeClock()
        self.tick_s, self.busy_w, self.idle_w = tick_s, busy_w, idle_w
        self.true_j = self.shown_j = 0.0
        self.next_tick_s = tick_s
        self.reader = ReplayReader([(0.0, 0.0)], clock=self.clock, update_period_s=tick_s)
        self.ledger = StepLedger(self.reader, clock=self.clock)
        self.paid_j: dict[int, float] = {}

    def spend(self, seconds: float, watts: float) -> None:
        while seconds > 1e-12:
            part_s = min(seconds, max(self.next_tick_s - self.clock.now_s(), 1e-9))
            self.true_j += watts * part_s
            self.clock.advance(part_s)
            seconds -= part_s
            if self.clock.now_s() >= self.next_tick_s - 1e-9:
                self.reader._times_s.append(self.clock.now_s())
                self.reader._values_j.append(self.true_j)
                self.next_tick_s += self.tick_s

    def step(self, seconds: float, rows: list[Row]) -> None:
        begin_s = self.clock.now_s()
        self.spend(seconds, self.busy_w)
        self.ledger.step(begin_s, self.clock.now_s(), batch(rows))

    def finish(self, *seq_ids: int) -> None:
        for seq_id in seq_ids:
            self.paid_j[seq_id] = self.ledger.finish(seq_id) or 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tick_s=st.sampled_from([0.001, 0.02, 0.1]),
    busy_w=st.floats(20, 700),
    idle_share=st.floats(0.05, 1.0),
)
def test_requests_and_idle_add_up_to_the_chip(seed: int, tick_s: float, busy_w: float, idle_share: float) -> None:
    chance = random.Random(seed)
    bench = Bench(tick_s=tick_s, busy_w=busy_w, idle_w=idle_share * busy_w)
    living: dict[int, int] = {}
    for seq_id in range(300):
        if chance.random() < 0.1:
            bench.spend(chance.uniform(0, 2), bench.idle_w)
        living[seq_id] = chance.randint(1, 30)
        rows = [(seq_id, chance.randint(1, 500), 0), *((other, 1, 100) for other in living if other != seq_id)]
        bench.step(chance.uniform(0.002, 0.2), rows)
        for other in [other for other in living if living[other] == 1]:
            del living[other]
            bench.finish(other)
        living = {other: left - 1 for other, left in living.items()}
    bench.finish(*living)
    bench.spend(0.5, bench.idle_w)
    bench.ledger.settle()
    totals = bench.ledger.totals
    assert totals.chip_j == pytest.approx(bench.true_j, rel=0.01)
    assert totals.requests_j + totals.idle_j == pytest.approx(totals.chip_j, rel=0.01)
    assert sum(bench.paid_j.values()) == pytest.approx(totals.requests_j, rel=0.01)
    assert min(bench.paid_j.values()) >= 0


def test_idle_time_goes_to_the_idle_bucket_at_idle_watts() -> None:
    bench = Bench(busy_w=200, idle_w=50)
    bench.spend(10, 50)
    bench.ledger.settle()
    for _ in range(100):
        bench.step(0.1, [(1, 1, 10)])
    bench.finish(1)
    bench.spend(10, 50)
    bench.ledger.settle()
    assert bench.ledger.totals.idle_j == pytest.approx(1000, rel=0.01)
    assert bench.paid_j[1] == pytest.approx(2000, rel=0.01)


def test_cost_of_what_is_in_a_step_is_found_from_its_seconds() -> None:
    chance, cost = random.Random(1), StepCost()
    for _ in range(2000):
        prefill, decode = chance.choice([0, 0, chance.randint(16, 512)]), chance.randint(1, 64)
        attention = prefill * prefill / 2 + decode * chance.randint(10, 2000)
        seconds = 0.004 + 60e-6 * prefill + 3e-9 * attention + 150e-6 * decode
        cost.observe(seconds * chance.gauss(1, 0.02), prefill, attention, decode)
    assert cost.constant_s == pytest.approx(0.004, rel=0.1)
    assert cost.prefill_s == pytest.approx(60e-6, rel=0.05)
    assert cost.attention_s == pytest.approx(3e-9, rel=0.1)
    assert cost.decode_s == pytest.approx(150e-6, rel=0.1)


def test_coefficients_are_never_negative() -> None:
    chance, cost = random.Random(2), StepCost()
    for _ in range(640):
        cost.observe(max(0.001, chance.gauss(0.01, 0.004)), chance.randint(0, 100), chance.randint(0, 10**6), 1)
    assert min(cost.constant_s, cost.prefill_s, cost.attention_s, cost.decode_s) >= 0


def test_prefill_pays_by_measured_cost_and_not_by_token_count() -> None:
    """A prompt token costs a hundredth of a decode row here, so 100 of them pay as much as one row."""
    chance, bench = random.Random(3), Bench(busy_w=100, idle_w=0)

    def run(rows: list[Row]) -> None:
        prefill = sum(num for _, num, _ in rows if num > 1)
        decode = sum(num == 1 for _, num, _ in rows)
        bench.step(1e-5 * prefill + 1e-3 * decode, rows)

    for _ in range(300):
        run([(0, chance.randint(2, 400), 0), *((i, 1, 0) for i in range(1, chance.randint(2, 30)))])
    bench.ledger.settle()
    bench.finish(*range(30))
    for _ in range(1000):
        run([(100, 100, 0), (101, 1, 0)])
    bench.finish(100, 101)
    assert bench.paid_j[100] == pytest.approx(bench.paid_j[101], rel=0.1)


def test_shares_of_engines_on_one_chip_add_up_to_it() -> None:
    clock = FakeClock()
    trace = [(t / 100, t * 1.0) for t in range(2000)]
    ledgers = [StepLedger(ReplayReader(trace, clock=clock), chip_share=0.5, clock=clock) for _ in range(2)]
    clock.advance(10)
    for ledger in ledgers:
        ledger.settle()
    assert sum(ledger.totals.idle_j for ledger in ledgers) == pytest.approx(1000)


def test_a_share_that_changes_counts_from_then_on() -> None:
    clock = FakeClock()
    reader = ReplayReader([(0.0, 0.0), (10.0, 1000.0), (20.0, 2000.0)], clock=clock, update_period_s=1.0)
    ledger = StepLedger(reader, chip_share=1.0, clock=clock)
    clock.advance(10)
    ledger.change_share(0.25)
    clock.advance(10)
    ledger.settle()
    assert ledger.totals.chip_j == pytest.approx(1000 + 250)


def test_interval_without_a_meter_is_lost_and_its_sequences_have_no_figure() -> None:
    clock = FakeClock()
    trace: list[tuple[float, float | None]] = [(t / 10, 10.0 * t if t < 50 else None) for t in range(200)]
    ledger = StepLedger(ReplayReader(trace, clock=clock), clock=clock)
    for i in range(100):
        clock.advance(0.1)
        ledger.step(clock.now_s() - 0.1, clock.now_s(), batch([(1 if i < 40 else 2, 1, 5)]))
        if i == 39:
            assert ledger.finish(1) == pytest.approx(400, rel=0.05)
    assert ledger.finish(2) is None
    assert ledger.totals.lost_s == pytest.approx(5, abs=0.5)
    assert ledger.totals.requests_j <= 500


def test_no_meter_charges_nobody() -> None:
    clock = FakeClock()
    ledger = StepLedger(NullReader("none here"), clock=clock)
    clock.advance(1)
    ledger.step(0, 1, batch([(1, 1, 1)]))
    assert ledger.finish(1) is None
    assert ledger.totals.chip_j == 0
