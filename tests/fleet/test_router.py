"""The router's choice is what its formula says, for every fleet."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxn.fleet.router import JOULES_S, RAMP_S, SLACK, Candidate, Work, choose, first_token_s

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
    expected_s = [first_token_s(candidate, work) for candidate in found]
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


def test_an_empty_newcomer_does_not_get_everything() -> None:
    old = [replace(PLAIN, work_tokens=2000.0) for _ in range(3)]
    newcomer = replace(PLAIN, ready_s=0.0)
    work = Work(prompt_tokens=100, output_tokens=100)
    counts = [0] * 4
    found = [*old, newcomer]
    for _ in range(24):
        chosen = choose(found, work)
        counts[chosen] += 1
        found[chosen] = replace(found[chosen], work_tokens=found[chosen].work_tokens + 200)
    assert 0 < counts[3] <= 6  # with its full capacity at once it would be 15 and more
    settled = [*old, replace(newcomer, ready_s=RAMP_S)]
    assert choose(settled, work) == 3


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
