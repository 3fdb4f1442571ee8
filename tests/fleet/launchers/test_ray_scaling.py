"""How many replicas a Ray cluster is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mxn.fleet.launchers.ray import scaling
from mxn.fleet.launchers.ray.scaling import LatencyWindow, ScalingPolicy


def context(
    sequences: dict[str, float], missed: dict[str, float], *, target: int, low: int = 1, high: int = 8
) -> object:
    return SimpleNamespace(
        aggregated_metrics={"sequences": sequences, "missed_share": missed},
        target_num_replicas=target,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
    )


@pytest.mark.parametrize(
    ("sequences", "missed_share", "target", "wanted"),
    [
        ([0.0], 0.0, 1, 1),
        ([12.0], 0.0, 1, 1),  # 80 % of a batch of 16 is 12.8
        ([13.0], 0.0, 1, 2),
        ([60.0, 4.0], 0.0, 2, 5),
        ([2.0, 2.0, 2.0], 0.0, 3, 1),
        ([2.0, 2.0, 2.0], 0.06, 3, 4),  # more than 5 % missed the SLO
        ([2.0, 2.0, 2.0], 0.05, 3, 1),
        ([1000.0], 0.5, 1, 8),  # no more than the bound
    ],
)
def test_replicas_are_enough_for_the_sequences_and_more_while_the_slo_is_missed(
    sequences: list[float], missed_share: float, target: int, wanted: int
) -> None:
    by_replica = {str(index): value for index, value in enumerate(sequences)}
    missed = dict.fromkeys(by_replica, missed_share)
    policy = ScalingPolicy(batch=16, percentile=95.0)
    assert policy(context(by_replica, missed, target=target))[0] == wanted


def test_nothing_changes_before_replicas_have_reported() -> None:
    assert ScalingPolicy(batch=16, percentile=95.0)(context({}, {}, target=3))[0] == 3


def test_a_sequence_is_held_against_both_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: now))
    window = LatencyWindow(ttft_s=1.0, tpot_s=0.1)
    for first_s, rest_s in ((0.5, 0.9), (2.0, 0.1), (0.5, 5.0), (0.5, 0.0)):
        timing = window.begin()
        now += first_s
        timing.add(1)
        now += rest_s
        timing.add(10)
        timing.end()
    assert window.missed_share() == 0.5
    window.begin().end()  # no token, no verdict
    assert window.missed_share() == 0.5
    now += 60
    assert window.missed_share() == 0.0
