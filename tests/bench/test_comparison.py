from dataclasses import replace

import pytest

from mxn.bench.comparison import GAIN_ERROR, Comparison, compare
from mxn.bench.records import Quality, Record
from mxn.bench.workloads import WORKLOADS
from mxn.core.quantity import Provenance

from .made import record, report, subject


def of_metric(found: list[Comparison], metric: str) -> Comparison:
    return next(c for c in found if c.metric == metric)


def test_known_difference_is_found_in_the_direction_of_better() -> None:
    base = record((100.0, 101.0, 99.0, 100.5, 99.5))
    faster = record((150.0, 151.5, 148.5, 150.75, 149.25))
    found, _ = compare(report(base), report(faster))
    for metric in ("output_tokens_per_s", "ttft_ms", "tpot_ms", "tokens_per_watt"):
        better = of_metric(found, metric).better
        assert better is not None
        assert better.value == pytest.approx(1.5, rel=0.005)
        assert better.low is not None
        assert better.low > 1.4


def test_same_speeds_show_no_difference() -> None:
    found, _ = compare(report(record((100.0, 104.0, 97.0))), report(record((101.0, 98.0, 103.0))))
    assert of_metric(found, "output_tokens_per_s").words.startswith("no difference shown")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (record(scope="wall"), "scope device"),
        (record(provenance=Provenance.ESTIMATED), "power is measured"),
        (record(of=subject(quantisation="fp32")), "precision is int8"),
        (record(of=subject(model="huge")), "the models differ"),
        (record(workload=replace(WORKLOADS["W2c8"], prompt_tokens=8192)), "lengths differ"),
        (record(workload=replace(WORKLOADS["W2c8"], concurrency=64)), "the load differs"),
    ],
    ids=["scope", "provenance", "precision", "model", "lengths", "load"],
)
def test_figures_that_are_not_like_for_like_are_warned_of(other: Record, words: str) -> None:
    _, warnings = compare(report(record()), report(other))
    assert any(words in warning for warning in warnings)
    _, none = compare(report(record()), report(record()))
    assert none == []


def test_meters_of_two_chips_may_differ_in_gain() -> None:
    same = of_metric(compare(report(record()), report(record()))[0], "tokens_per_watt").better
    apart = of_metric(compare(report(record()), report(record(), chip="Other"))[0], "tokens_per_watt").better
    assert same is not None
    assert apart is not None
    assert (apart.high or 0) == pytest.approx((same.high or 0) * (1 + GAIN_ERROR))


def test_faster_wrong_answer_is_not_compared() -> None:
    failed = Quality(
        reference="cpu fp32",
        num_positions=100,
        agreement=0.1,
        mean_loglik=-9.0,
        reference_loglik=-2.0,
        is_passed=False,
        note="10 % agree",
    )
    found, warnings = compare(report(record()), report(record((900.0,), quality=failed)))
    assert found == []
    assert any("fails the quality gate: 10 % agree" in warning for warning in warnings)


def test_unknown_energy_stays_unknown() -> None:
    found, _ = compare(report(record()), report(record(watts=None)))
    assert of_metric(found, "tokens_per_watt").words == "not known in both"


def test_reports_without_a_common_workload_say_what_they_have() -> None:
    found, warnings = compare(report(record()), report(record(workload=WORKLOADS["W1"])))
    assert found == []
    assert "W2c8, and W1" in warnings[-1]
