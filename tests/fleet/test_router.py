"""The router's choice is what its formula says, for every fleet."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.fleet.router import JOULES_S, RAMP_S, SLACK, Candidate, Work, choose, first_tokens_s

PLAIN = Candidate(work_tokens=0.0, tokens_per_s=1000.0, prompt_token_s=0.001)


def candidates(max_size: int = 8) -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(
        Candidate,
        work_tokens=st.floats(0, 1e6),
        tokens_per_s=st.floats(0.1, 1e6),
        prompt_token_s=st.floats(1e-7, 1.0),
        cached_tokens=st.integers(0, 100),
        joules_per_token=st.none() | st.floats(0, 100),
        ready_s=st.floats(0, 1000),
    )
    return st.lists(one, min_size=1, max_size=max_size)


WORK = st.builds(
    Work,
    prompt_tokens=st.integers(100, 4000),
    output_tokens=st.floats(1, 4000),
    ttft_slo_s=st.none() | st.floats(0.001, 100),
)


@given(candidates(), WORK)
def test_the_same_facts_give_the_same_choice_and_it_is_one_of_them(found: list[Candidate], work: Work) -> None:
    chosen = choose(found, work)
    assert 0 <= chosen < len(found)
    assert choose(list(found), replace(work)) == chosen


@given(candidates(), WORK)
def test_nobody_waits_beyond_the_slack_for_the_sake_of_joules(found: list[Candidate], work: Work) -> None:
    expected_s = first_tokens_s(found, work)
    chosen_s = expected_s[choose(found, work)]
    slack_s = 0.0 if work.ttft_slo_s is None else SLACK * work.ttft_slo_s
    assert chosen_s <= max(min(expected_s), slack_s)


@given(st.integers(1, 100), st.floats(0, 1000), st.integers(2, 5))
def test_a_hit_is_preferred_until_the_queue_costs_more_than_it_saves(hit: int, queue: float, count: int) -> None:
    busy = replace(PLAIN, cached_tokens=hit, work_tokens=queue)
    work = Work(prompt_tokens=200, output_tokens=10)
    saved_s, cost_s = hit * PLAIN.prompt_token_s, queue / PLAIN.tokens_per_s
    chosen = choose([*[PLAIN] * (count - 1), busy], work)
    if cost_s < saved_s * (1 - 1e-9):
        assert chosen == count - 1
    elif cost_s > saved_s * (1 + 1e-9):
        assert chosen == 0


@given(st.integers(2, 6), st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=60))
def test_equal_replicas_are_loaded_evenly_within_one_sequence(count: int, sizes: list[tuple[int, int]]) -> None:
    load = [0.0] * count
    for prompt, output in sizes:
        found = [replace(PLAIN, work_tokens=tokens) for tokens in load]
        load[choose(found, Work(prompt_tokens=prompt, output_tokens=output))] += prompt + output
    assert max(load) - min(load) <= max(prompt + output for prompt, output in sizes)


@given(st.floats(1.1, 50.0))
def test_a_faster_replica_gets_more_in_proportion(ratio: float) -> None:
    load = [0.0, 0.0]
    speeds = (1000.0, 1000.0 * ratio)
    for _ in range(400):
        found = [
            replace(PLAIN, work_tokens=tokens, tokens_per_s=speed, prompt_token_s=1 / speed)
            for tokens, speed in zip(load, speeds, strict=True)
        ]
        load[choose(found, Work(prompt_tokens=50, output_tokens=50))] += 100
    assert load[1] / speeds[1] == pytest.approx(load[0] / speeds[0], abs=0.25)


def share_of_newcomer(ready_s: float) -> int:
    """How many of 24 sequences an empty replica gets beside three with 2 s of work each."""
    found = [*[replace(PLAIN, work_tokens=2000.0)] * 3, replace(PLAIN, ready_s=ready_s)]
    count = 0
    for _ in range(24):
        chosen = choose(found, Work(prompt_tokens=100, output_tokens=100))
        count += chosen == 3
        found[chosen] = replace(found[chosen], work_tokens=found[chosen].work_tokens + 200)
    return count


def test_an_empty_newcomer_does_not_get_everything() -> None:
    assert share_of_newcomer(RAMP_S) >= 13
    assert 2 <= share_of_newcomer(0.0) <= 6  # its even share
    assert share_of_newcomer(0.0) < share_of_newcomer(RAMP_S / 2) < share_of_newcomer(RAMP_S)


@given(st.lists(st.floats(0, 2), min_size=2, max_size=6), st.integers(1, 200))
def test_replicas_that_are_all_new_are_loaded_alike(ages: list[float], count: int) -> None:
    load = [0.0] * len(ages)
    for _ in range(count):
        found = [replace(PLAIN, work_tokens=w, ready_s=age) for w, age in zip(load, ages, strict=True)]
        load[choose(found, Work(prompt_tokens=50, output_tokens=50))] += 100
    mean = sum(load) / len(load)
    assert max(load) <= (1 + max(ages) / RAMP_S) * mean * len(load) / (len(load) - 1) + 200


def test_joules_decide_only_while_the_slo_has_slack() -> None:
    quick = replace(PLAIN, joules_per_token=2.0)
    frugal = replace(PLAIN, joules_per_token=0.5, work_tokens=400.0)
    work = Work(prompt_tokens=100, output_tokens=100, ttft_slo_s=2.0)
    assert choose([quick, frugal], work) == 1
    assert choose([quick, replace(frugal, work_tokens=950.0)], work) == 0  # its first token would come too late
    assert choose([quick, frugal], replace(work, ttft_slo_s=None)) == 0
    assert choose([quick, replace(frugal, joules_per_token=None)], work) == 0
    near = replace(frugal, joules_per_token=2.0 - 0.3 / (JOULES_S * 100))
    assert choose([quick, near], work) == 0  # it saves 3 joules for 0.4 s more
