from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.fleet.planner.pricing import TOLERANCE, cheapest_mix, penalty

ITEM = st.tuples(st.floats(0.1, 100), st.floats(0.05, 1), st.integers(0, 3))


def _cheapest_by_enumeration(costs, covers, uppers, pieces, min_count, max_count) -> float:
    best = math.inf
    for counts in itertools.product(*(range(upper + 1) for upper in uppers)):
        if not min_count <= sum(counts) <= (math.inf if max_count is None else max_count):
            continue
        unserved = max(0.0, 1.0 - sum(n * cover for n, cover in zip(counts, covers, strict=True)))
        cost = sum(n * cost for n, cost in zip(counts, costs, strict=True))
        best = min(best, cost + (penalty(pieces, unserved) if unserved > 1e-9 else 0.0))
    return best


@given(
    st.lists(ITEM, min_size=1, max_size=5),
    st.sampled_from([((1.0, 30.0),), ((0.25, 5.0), (0.25, 60.0), (0.5, 400.0)), ((0.3, 0.0),), ()]),
    st.integers(0, 3),
    st.none() | st.integers(3, 5),
)
def test_no_mix_is_cheaper_and_the_bound_is_below_all(items, pieces, min_count, max_count) -> None:
    costs, covers, uppers = (list(column) for column in zip(*items, strict=True))
    best = _cheapest_by_enumeration(costs, covers, uppers, pieces, min_count, max_count)
    mix = cheapest_mix(costs, covers, uppers, pieces, min_count=min_count, max_count=max_count)
    if mix is None:
        assert best == math.inf
        return
    assert mix.cost <= best * (1 + TOLERANCE) + 1e-9
    assert mix.bound <= best * (1 + 1e-9) + 1e-9
    assert min_count <= sum(mix.counts)
    assert all(0 <= n <= u for n, u in zip(mix.counts, uppers, strict=True))
    assert sum(n * c for n, c in zip(mix.counts, covers, strict=True)) + mix.unserved >= 1 - 1e-8


def test_unserved_load_beyond_the_pieces_is_not_allowed() -> None:
    assert penalty(((0.5, 1.0),), 0.6) == math.inf
    assert cheapest_mix([1.0], [0.4], [1], ((0.5, 1.0),)) is None


def test_a_search_too_long_for_enumeration_is_answered_by_the_integer_program(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ([3.0, 5.0, 7.1], [0.21, 0.37, 0.53], [9, 9, 9], ((1.0, 100.0),))
    usual = cheapest_mix(*arguments, min_count=1)
    monkeypatch.setattr("mxn.fleet.planner.pricing.MAX_NODES", 1)
    other = cheapest_mix(*arguments, min_count=1)
    assert usual is not None
    assert other is not None
    assert other.cost == pytest.approx(usual.cost, rel=2 * TOLERANCE)
