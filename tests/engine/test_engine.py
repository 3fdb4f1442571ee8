"""The engine on the fake executor, whose tokens are a hash of what the block tables really hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.backends.fake import FakeExecutor, FakeOptions, fake_next_token
from mxn.core.batch import StepBatch, StepResult
from mxn.core.clock import FakeClock
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest
from mxn.energy.attribution import StepLedger
from mxn.energy.replay import ConstantReader
from mxn.engine.engine import Engine, EngineSettings
from mxn.engine.paged import BlockPlacement
from mxn.errors import ChipError, RequestError

VOCAB = 97


class RecordingExecutor(FakeExecutor):
    """A fake executor that remembers every batch it was given."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.batches: list[list[tuple[int, int, int]]] = []

    def execute(self, batch: StepBatch) -> StepResult:
        self.batches.append([(s.seq_id, s.start, len(s.token_ids)) for s in batch.sequences])
        return super().execute(batch)


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_context: int = 200,
    options: dict[str, str] | None = None,
    **fields: object,
) -> Engine:
    executor = RecordingExecutor(
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=VOCAB,
        max_context=max_context,
        options=FakeOptions(tuple((options or {}).items())),
    )
    return Engine(executor, EngineSettings(**fields))  # type: ignore[arg-type]


def batches(engine: Engine) -> list[list[tuple[int, int, int]]]:
    assert isinstance(engine.executor, RecordingExecutor)
    return engine.executor.batches


def request(seq_id: int, prompt: list[int], max_tokens: int = 4, **fields: object) -> SequenceRequest:
    extra = {k: fields.pop(k) for k in ("cache_salt", "priority") if k in fields}
    sampling = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **fields})  # type: ignore[arg-type]
    return SequenceRequest(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling, **extra)  # type: ignore[arg-type]


def oracle(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(fake_next_token(np.asarray(ids, dtype=np.int32), 0, VOCAB))
    return ids[len(prompt) :]


def drain(engine: Engine, max_steps: int = 5000) -> dict[int, list[SequenceOutput]]:
    outputs: dict[int, list[SequenceOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.seq_id, []).append(output)
        engine.check_integrity()
    raise AssertionError(f"not finished after {max_steps} steps")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def test_every_sequence_gets_its_own_tokens_and_all_blocks_come_back() -> None:
    engine = make_engine()
    prompts = {i: [(i * 7 + j) % VOCAB for j in range(3 + 5 * i)] for i in range(8)}
    for seq_id, prompt in prompts.items():
        engine.add(request(seq_id, prompt, max_tokens=5))
    outputs = drain(engine)
    assert {i: tokens(o) for i, o in outputs.items()} == {i: oracle(p, 5) for i, p in prompts.items()}
    assert engine.stats.num_free_blocks == engine.stats.num_total_blocks


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, object]:
    families = draw(st.lists(st.integers(0, 3), min_size=1, max_size=10))
    return {
        "num_blocks": draw(st.integers(12, 40)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_step_tokens": draw(st.integers(1, 24)),
        "prefix_cache": draw(st.booleans()),
        "prompts": [
            [family] * draw(st.integers(1, 20)) + draw(st.lists(st.integers(0, VOCAB - 1), max_size=12))
            for family in families
        ],
        "max_tokens": draw(st.lists(st.integers(1, 12), min_size=len(families), max_size=len(families))),
        "priorities": draw(st.lists(st.integers(-1, 1), min_size=len(families), max_size=len(families))),
        "arrivals": sorted(draw(st.lists(st.integers(0, 12), min_size=len(families), max_size=len(families)))),
        "aborts": draw(st.dictionaries(st.integers(0, len(families) - 1), st.integers(0, 15), max_size=3)),
    }


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_random_arrivals_aborts_and_preemptions_leak_nothing_and_change_no_token(work: dict) -> None:  # type: ignore[type-arg]
    engine = make_engine(
        num_blocks=work["num_blocks"],
        max_context=work["num_blocks"] * 4,
        max_num_seqs=work["max_num_seqs"],
        max_step_tokens=work["max_step_tokens"],
        prefix_cache=work["prefix_cache"],
    )
    pending = list(enumerate(zip(work["arrivals"], work["prompts"], strict=True)))
    outputs: dict[int, list[SequenceOutput]] = {i: [] for i, _ in pending}
    total_work = sum(len(p) + n for p, n in zip(work["prompts"], work["max_tokens"], strict=True))
    for step in range(40 + 30 * total_work):
        while pending and pending[0][1][0] <= step:
            i, (_, prompt) = pending.pop(0)
            engine.add(request(i, prompt, max_tokens=work["max_tokens"][i], priority=work["priorities"][i]))
        gone = [i for i, at in work["aborts"].items() if at == step]
        for output in engine.abort(gone) + engine.step():
            outputs[output.seq_id].append(output)
        engine.check_integrity()
        if not pending and not engine.has_work:
            break
    else:
        raise AssertionError("a sequence starved")
    for i, prompt in enumerate(work["prompts"]):
        reasons = [o.finish_reason for o in outputs[i] if o.finish_reason]
        assert len(reasons) == 1
        want = oracle(prompt, work["max_tokens"][i])
        got = tokens(outputs[i])
        assert got == want[: len(got)]
        if reasons[0] is not FinishReason.ABORT:
            assert got == want
    assert engine.stats.num_free_blocks == engine.stats.num_total_blocks
    assert isinstance(engine.placement, BlockPlacement)
    assert engine.placement.cache.num_in_flight == 0


def test_a_step_never_exceeds_its_limits() -> None:
    engine = make_engine(num_blocks=100, max_num_seqs=3, max_step_tokens=10)
    for i in range(9):
        engine.add(request(i, [i] * 17, max_tokens=6))
    drain(engine)
    assert max(sum(n for *_, n in batch) for batch in batches(engine)) <= 10
    assert max(len(batch) for batch in batches(engine)) <= 3


def test_a_short_prompt_is_not_held_up_by_long_ones() -> None:
    engine = make_engine(num_blocks=400, max_context=400, max_step_tokens=32, prefix_cache=False)
    for i in range(4):
        engine.add(request(i, [i] * 300, max_tokens=1))
    engine.step()
    engine.add(request(9, [9] * 8, max_tokens=1))
    finished = []
    while engine.has_work:
        finished += [o.seq_id for o in engine.step()]
    assert finished[0] == 9
    assert len(batches(engine)) < 45  # 1208 tokens in steps of 32: the budget is used


def test_the_first_in_line_progresses_under_a_stream_of_short_prompts() -> None:
    engine = make_engine(num_blocks=400, max_context=400, max_step_tokens=16, prefix_cache=False)
    engine.add(request(0, [1] * 200, max_tokens=1))
    for step in range(60):
        engine.add(request(step + 1, [2] * 16, max_tokens=1))
        if any(o.seq_id == 0 for o in engine.step()):
            break
    else:
        raise AssertionError("the long prompt starved")


def test_a_shared_prefix_is_computed_once_even_when_requests_arrive_together() -> None:
    engine = make_engine(num_blocks=200, max_context=400, max_step_tokens=20)
    shared = [5] * 64
    for i in range(4):
        engine.add(request(i, [*shared, i, i], max_tokens=3))
    outputs = drain(engine)
    assert {i: tokens(o) for i, o in outputs.items()} == {i: oracle([*shared, i, i], 3) for i in range(4)}
    assert engine.stats.num_cached_tokens == 3 * 64
    assert engine.stats.num_computed_tokens == 64 + 4 * (2 + 2)


def test_a_repeated_prompt_leaves_one_token_to_compute() -> None:
    engine = make_engine()
    for i in range(2):
        engine.add(request(i, [3] * 16, max_tokens=1))
        [output] = drain(engine)[i]
        assert output.num_cached_tokens == (0 if i == 0 else 12)


def test_generated_tokens_are_reused_by_the_next_turn() -> None:
    engine = make_engine()
    engine.add(request(0, [3] * 8, max_tokens=9))
    answer = tokens(drain(engine)[0])
    engine.add(request(1, [3] * 8 + answer, max_tokens=1))
    assert drain(engine)[1][0].num_cached_tokens == 16


@pytest.mark.parametrize(("salt", "cached"), [("tenant-a", 12), ("tenant-b", 0)])
def test_tenants_never_share_blocks(salt: str, cached: int) -> None:
    engine = make_engine()
    engine.add(request(0, [3] * 16, max_tokens=1, cache_salt="tenant-a"))
    drain(engine)
    engine.add(request(1, [3] * 16, max_tokens=1, cache_salt=salt))
    assert drain(engine)[1][0].num_cached_tokens == cached


def test_a_forgotten_prefix_is_computed_again() -> None:
    engine = make_engine()
    engine.add(request(0, [3] * 16, max_tokens=1))
    drain(engine)
    engine.reset_prefix_cache()
    engine.add(request(1, [3] * 16, max_tokens=1))
    assert drain(engine)[1][0].num_cached_tokens == 0


def test_preempted_sequences_continue_with_the_same_tokens() -> None:
    engine = make_engine(num_blocks=14, max_context=56, prefix_cache=False)
    for i in range(3):
        engine.add(request(i, [i] * 8, max_tokens=30))
    outputs = drain(engine)
    assert engine.stats.num_preemptions > 0
    assert {i: tokens(o) for i, o in outputs.items()} == {i: oracle([i] * 8, 30) for i in range(3)}


def test_a_more_urgent_sequence_is_served_first() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add(request(0, [1], priority=5))
    engine.add(request(1, [2], priority=-5))
    first = next(output for _ in range(3) for output in engine.step())
    assert first.seq_id == 1


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_same_seed_gives_the_same_tokens_in_any_company(prefix_cache: bool) -> None:
    def sampled(company: int) -> list[int]:
        engine = make_engine(prefix_cache=prefix_cache, max_step_tokens=7)
        engine.add(request(0, [1, 2, 3], max_tokens=6, temperature=1.0, seed=42))
        for i in range(company):
            engine.add(request(i + 1, [i] * (i + 1), temperature=1.0))
        return tokens(drain(engine)[0])

    assert sampled(0) == sampled(5)


def test_stop_ids_end_a_sequence_but_not_before_min_tokens() -> None:
    engine = make_engine(options={"script": "7,8"})
    engine.add(request(0, [1], max_tokens=10, stop_token_ids=(8,)))
    engine.add(request(1, [1], max_tokens=10, stop_token_ids=(8,), min_tokens=3))
    outputs = drain(engine)
    assert tokens(outputs[0]) == [7, 8]
    assert tokens(outputs[1]) == [7, 8, 7, 8]
    assert outputs[0][-1].finish_reason is FinishReason.STOP


def test_the_context_limit_ends_a_sequence() -> None:
    engine = make_engine(max_context=12)
    engine.add(request(0, [1] * 8, max_tokens=100))
    outputs = drain(engine)[0]
    assert len(tokens(outputs)) == 4
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (request(0, []), "no tokens"),
        (request(0, [VOCAB]), "0..96"),
        (request(0, [-1]), "0..96"),
        (request(0, [1] * 200), "200 tokens"),
        (request(0, [1], max_tokens=0), "max_tokens"),
        (request(0, [1], logit_bias=((VOCAB, 1.0),)), "logit_bias"),
        (request(0, [1], stop_token_ids=(2**31,)), "stop_token_ids"),
    ],
)
def test_an_impossible_request_is_refused_at_the_replica_too(bad: SequenceRequest, match: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=match):
        engine.add(bad)
    assert not engine.has_work


def test_a_sequence_whose_output_is_not_a_number_fails_alone() -> None:
    engine = make_engine(options={"nan_on": "96"})
    engine.add(request(0, [96], max_tokens=2))
    engine.add(request(1, [1, 2], max_tokens=2))
    outputs = drain(engine)
    assert outputs[0][-1].finish_reason is FinishReason.ERROR
    assert tokens(outputs[1]) == oracle([1, 2], 2)


def test_a_step_that_does_not_fit_shrinks_the_batch(recwarn: pytest.WarningsRecorder) -> None:
    engine = make_engine(options={"oom_on": "96"})
    engine.add(request(0, [1, 2], max_tokens=2))
    engine.add(request(1, [96], max_tokens=2))
    outputs = drain(engine)
    assert tokens(outputs[0]) == oracle([1, 2], 2)
    assert outputs[1][-1].finish_reason is FinishReason.ERROR
    assert "2 GiB" in (outputs[1][-1].error or "")


def test_a_lost_chip_is_not_swallowed() -> None:
    engine = make_engine(options={"lose_chip_after": "1"})
    engine.add(request(0, [1]))
    engine.step()
    with pytest.raises(ChipError, match="lost"):
        engine.step()


def test_aborting_unknown_or_finished_sequences_does_nothing() -> None:
    engine = make_engine()
    engine.add(request(0, [1], max_tokens=1))
    drain(engine)
    assert engine.abort([0, 99]) == []


def test_time_in_the_queue_is_counted_once_per_sequence_at_its_first_step() -> None:
    engine, clock = make_engine(max_num_seqs=1), FakeClock()
    engine._clock = clock
    for seq_id in (1, 2, 3):
        engine.add(request(seq_id, [seq_id] * 5, max_tokens=2))
    clock.advance(1.0)
    engine.step()
    assert (engine.stats.num_started, engine.stats.queue_s) == (1, 1.0)
    engine.abort([3])
    while engine.has_work:
        clock.advance(1.0)
        engine.step()
    assert engine.stats.num_started == 2
    assert engine.stats.queue_s == 1.0 + 3.0


def test_an_idle_engine_plans_nothing() -> None:
    assert make_engine().step() == []


def test_last_output_carries_the_joules_of_its_sequence_and_all_add_up() -> None:
    clock = FakeClock()

    class Slow(RecordingExecutor):
        def execute(self, batch: StepBatch) -> StepResult:
            clock.advance(0.1)
            return super().execute(batch)

    executor = Slow(num_blocks=64, block_size=4, vocab_size=VOCAB, max_context=200, options=FakeOptions(()))
    ledger = StepLedger(ConstantReader(50, detail="", clock=clock), clock=clock)
    engine = Engine(executor, EngineSettings(), clock, ledger)
    sampling = SamplingParams(max_tokens=40, temperature=0)
    for seq_id in (1, 2, 3):
        engine.add(SequenceRequest(seq_id=seq_id, prompt_token_ids=[1, 2, 3], sampling=sampling))
    outputs = [output for _ in range(20) for output in engine.step()]
    outputs += engine.abort([3])
    while engine.has_work:
        outputs += engine.step()
    engine.settle_energy()
    charged = [output.energy_j for output in outputs if output.finish_reason is FinishReason.LENGTH]
    aborted = [output.energy_j for output in outputs if output.finish_reason is FinishReason.ABORT]
    assert aborted == pytest.approx([20 / 3 * 0.1 * 50], rel=0.02)
    assert charged == pytest.approx([(20 / 3 + 10) * 0.1 * 50] * 2, rel=0.02)
    stats = engine.stats
    assert stats.chip_energy_j == pytest.approx(200)
    assert (stats.request_energy_j or 0) + (stats.idle_energy_j or 0) == pytest.approx(200, rel=0.01)
