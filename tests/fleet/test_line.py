"""The waiting line: order by tier and arrival whatever leaves in between, and foretold waits."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mxn.fleet.line import Departures, WaitingLine


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.integers(0, 3)), max_size=300))
def test_the_line_is_a_sorted_list(moves: list[tuple[str, int]]) -> None:
    line: WaitingLine[str] = WaitingLine()
    model: list[tuple[int, int, str]] = []
    for what, number in moves:
        if what == "push":
            arrival = line.arrive()
            line.push(number, arrival, f"{number}/{arrival}")
            model.append((number, arrival, f"{number}/{arrival}"))
        elif model and what == "pop":
            first = min(model)
            assert line.first() == first[2]
            assert line.pop() == first[2]
            model.remove(first)
        elif model:
            gone = model.pop(number % len(model))
            line.remove(gone[0], gone[1])
        assert len(line) == len(model)
        assert sorted(line) == sorted(entry for *_, entry in model)
        assert line.first() == (min(model)[2] if model else None)
        assert line.last_tier() == (max(model)[0] if model else -math.inf)
        if model:
            assert line.last() == max(model)[2]


def test_a_wait_is_foretold_by_the_pace_of_late() -> None:
    departures = Departures()
    for i in range(20):
        departures.note(0.5 * i)
    assert departures.wait_s(10, now_s=9.5) == 10 * 9.5 / 20
    assert departures.wait_s(10, now_s=100.0) is None  # nothing of late
    departures.note(101.0)
    departures.clear()
    assert departures.wait_s(1, now_s=101.0) is None
