"""Steps prepared while the one before runs, on a fake chip that runs them late: tokens as of one step at a time."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.backends.base import PendingStep
from mxn.backends.fake import FakeAheadExecutor, FakeOptions
from mxn.core.batch import PENDING, StepBatch
from mxn.core.clock import FakeClock
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest
from mxn.energy.attribution import StepLedger
from mxn.energy.replay import ConstantReader
from mxn.engine.engine import Engine, EngineSettings
from mxn.engine.paged import BlockPlacement
from mxn.errors import ChipError, OutOfMemoryError

VOCAB = 97


class Chip(FakeAheadExecutor):
    """Remembers what was submitted; has memory for `most` sequences in a step."""

    def __init__(self, *, most: int = 64, **parts: object) -> None:
        super().__init__(**parts)
        self.submitted: list[list[tuple[int, int, tuple[int, ...]]]] = []
        self.filed: set[bytes] = set()
        self._most = most

    def submit(self, batch: StepBatch) -> PendingStep:
        self.submitted.append([(s.seq_id, s.start, tuple(s.token_ids)) for s in batch.sequences])
        if len(batch.sequences) > self._most:
            raise OutOfMemoryError("the step needs 2 GiB; the fake chip has 1 GiB free")
        return super().submit(batch)


def make_engine(
    *,
    num_blocks: int = 64,
    max_context: int = 200,
    most: int = 64,
    options: dict[str, str] | None = None,
    **fields: object,
) -> Engine:
    executor = Chip(
        num_blocks=num_blocks,
        block_size=4,
        vocab_size=VOCAB,
        max_context=max_context,
        options=FakeOptions(tuple((options or {}).items())),
        most=most,
    )
    return Engine(executor, EngineSettings(**fields))  # type: ignore[arg-type]


def request(seq_id: int, prompt: Sequence[int], priority: int = 0, **sampling: object) -> SequenceRequest:
    rules = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})  # type: ignore[arg-type]
    return SequenceRequest(seq_id=seq_id, prompt_token_ids=list(prompt), sampling=rules, priority=priority)


def is_ahead(engine: Engine) -> list[bool]:
    assert isinstance(engine.executor, Chip)
    return [any(tokens == (PENDING,) for *_, tokens in step) for step in engine.executor.submitted]


Answers = dict[int, tuple[list[int], FinishReason | None]]


def collect(answers: Answers, outputs: list[SequenceOutput]) -> None:
    for output in outputs:
        tokens, reason = answers.get(output.seq_id, ([], None))
        assert reason is None, "nothing comes after the last output"
        answers[output.seq_id] = (tokens + output.token_ids, output.finish_reason)


def drain(engine: Engine) -> Answers:
    answers: Answers = {}
    for _ in range(3000):
        if not engine.has_work:
            assert engine.stats.num_free_blocks == engine.stats.num_total_blocks
            return answers
        collect(answers, engine.step())
        check(engine)
    raise AssertionError("not finished after 3000 steps")


def check(engine: Engine) -> None:
    """The books are right, and every block that can be found holds the tokens it is filed under."""
    engine.check_integrity()
    placement, chip = engine.placement, engine.executor
    assert isinstance(placement, BlockPlacement)
    assert isinstance(chip, Chip)
    filed = placement.pool._block_of
    new = filed.keys() - chip.filed
    chip.filed |= new
    for content in new:
        ids = array("i", chip._cache[filed[content]].tolist()).tobytes()
        parents = (placement.root(""), *chip.filed)
        assert any(hashlib.sha256(parent + ids).digest() == content for parent in parents)


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, object]:
    families = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    count = len(families)

    def each(values: st.SearchStrategy[object]) -> list[object]:
        return draw(st.lists(values, min_size=count, max_size=count))

    return {
        "num_blocks": draw(st.integers(12, 40)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_step_tokens": draw(st.integers(1, 24)),
        "prefix_cache": draw(st.booleans()),
        "has_mixed_steps": draw(st.booleans()),
        "options": draw(st.sampled_from([{}, {"raise_on": "7"}, {"nan_on": "7"}, {"oom_on": "7"}])),
        "most": draw(st.sampled_from([2, 64])),
        "prompts": [
            [family] * draw(st.integers(1, 20)) + draw(st.lists(st.integers(0, VOCAB - 1), max_size=10))
            for family in families
        ],
        "sampling": [
            {"max_tokens": a, "stop_token_ids": tuple(range(b)), "temperature": c, "seed": d} | e
            for a, b, c, d, e in zip(
                each(st.integers(1, 12)),
                each(st.sampled_from([0, 20])),
                each(st.sampled_from([0.0, 1.0])),
                each(st.integers(0, 9)),
                each(st.sampled_from([{}, {}, {}, {"num_logprobs": 1}, {"presence_penalty": 1.0}, {"min_tokens": 3}])),
                strict=True,
            )
        ],
        "priorities": each(st.integers(-1, 1)),
        "arrivals": sorted(each(st.integers(0, 12))),  # type: ignore[type-var]
        "aborts": draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 15), max_size=3)),
    }


def run(work: dict, *, looks_ahead: bool) -> Answers:  # type: ignore[type-arg]
    engine = make_engine(
        num_blocks=work["num_blocks"],
        max_context=work["num_blocks"] * 4,
        most=work["most"],
        options=work["options"],
        max_num_seqs=work["max_num_seqs"],
        max_step_tokens=work["max_step_tokens"],
        prefix_cache=work["prefix_cache"],
        has_mixed_steps=work["has_mixed_steps"],
        looks_ahead=looks_ahead,
    )
    coming = list(enumerate(work["arrivals"]))
    answers: Answers = {}
    for step in range(3000):
        while coming and coming[0][1] <= step:
            i, _ = coming.pop(0)
            engine.add(request(i, work["prompts"][i], work["priorities"][i], **work["sampling"][i]))
        collect(answers, engine.abort([i for i, at in work["aborts"].items() if at == step]))
        collect(answers, engine.step())
        check(engine)
        if not coming and not engine.has_work:
            break
    else:
        raise AssertionError("a sequence starved")
    assert engine.stats.num_free_blocks == engine.stats.num_total_blocks
    assert isinstance(engine.placement, BlockPlacement)
    assert engine.placement.cache.num_in_flight == 0
    if not looks_ahead:
        assert not any(is_ahead(engine))
    return answers


@settings(max_examples=200, deadline=None)
@given(workloads())
def test_looking_ahead_changes_no_token_and_no_reason_to_end(work: dict) -> None:  # type: ignore[type-arg]
    ahead, one_at_a_time = run(work, looks_ahead=True), run(work, looks_ahead=False)
    assert ahead.keys() == one_at_a_time.keys()
    for seq_id, (tokens, reason) in ahead.items():
        others, other_reason = one_at_a_time[seq_id]
        if FinishReason.ABORT in (reason, other_reason):  # at another token than without, if it was not through by then
            shorter = min(len(tokens), len(others))
            assert tokens[:shorter] == others[:shorter]
        else:
            assert (tokens, reason) == (others, other_reason)


def test_each_decode_step_is_submitted_while_the_one_before_is_under_way() -> None:
    engine = make_engine()
    engine.add(request(0, [1, 2, 3], max_tokens=6))
    assert len(drain(engine)[0][0]) == 6
    assert is_ahead(engine) == [False, True, True, True, True, True]


def test_a_sequence_whose_length_ends_it_gets_no_surplus_step() -> None:
    engine = make_engine(max_context=12)
    engine.add(request(0, [1] * 3, max_tokens=2))
    engine.add(request(1, [2] * 8, max_tokens=100))
    answers = drain(engine)
    assert [len(answers[i][0]) for i in range(2)] == [2, 4]
    assert isinstance(engine.executor, Chip)
    assert sum(seq_id == 0 for step in engine.executor.submitted for seq_id, *_ in step) == 2
    assert sum(seq_id == 1 for step in engine.executor.submitted for seq_id, *_ in step) == 4


def test_the_surplus_token_after_an_end_token_is_dropped_and_its_room_given_back() -> None:
    engine = make_engine(options={"script": "7,8,9"})
    engine.add(request(0, [1] * 3, max_tokens=10, stop_token_ids=(8,)))
    engine.step()
    [output] = engine.step()
    assert (output.token_ids, output.finish_reason) == ([8], FinishReason.STOP)
    assert engine.stats.num_free_blocks == engine.stats.num_total_blocks
    assert engine.has_work, "the surplus step is under way"
    assert engine.step() == []
    assert not engine.has_work
    assert engine.stats.num_output_tokens == 2


def test_a_sequence_aborted_while_its_step_runs_answers_once() -> None:
    engine = make_engine()
    engine.add(request(0, [1] * 3))
    engine.add(request(1, [2] * 3))
    first = engine.step()
    [output] = engine.abort([0])
    assert output.finish_reason is FinishReason.ABORT
    answers: Answers = {}
    collect(answers, [o for o in first if o.seq_id == 1])
    for seq_id, (tokens, _) in drain(engine).items():
        assert seq_id == 1
        assert len(tokens) == 7


@pytest.mark.parametrize(
    "rule",
    [{"num_logprobs": 1}, {"logit_bias": ((3, 1.0),)}, {"repetition_penalty": 1.2}, {"min_tokens": 6}],
    ids=lambda rule: next(iter(rule)),
)
def test_no_step_is_planned_past_one_whose_draw_needs_the_host(rule: dict[str, object]) -> None:
    engine = make_engine()
    engine.add(request(0, [1, 2], max_tokens=5, **rule))
    assert len(drain(engine)[0][0]) == 5
    assert not any(is_ahead(engine))


def test_room_is_taken_from_nobody_for_a_step_planned_ahead() -> None:
    engine = make_engine(num_blocks=14, max_context=56, prefix_cache=False)
    for i in range(3):
        engine.add(request(i, [i] * 8, max_tokens=30))
    launch = engine._launch

    def watched(*, may_preempt: bool = True) -> object:
        before = engine._scheduler.num_preemptions
        flight = launch(may_preempt=may_preempt)
        assert may_preempt or engine._scheduler.num_preemptions == before
        return flight

    engine._launch = watched  # type: ignore[method-assign,assignment]
    answers = drain(engine)
    assert engine.stats.num_preemptions > 0
    assert [len(answers[i][0]) for i in range(3)] == [30] * 3
    assert sum(is_ahead(engine)) > 20


def test_a_failure_under_way_voids_the_step_planned_on_it_and_ends_only_the_guilty() -> None:
    engine = make_engine(options={"raise_on": "96"})
    engine.add(request(0, [1, 2], max_tokens=6))
    alone = drain(engine)[0]
    engine = make_engine(options={"raise_on": "96"}, max_step_tokens=4)
    engine.add(request(0, [1, 2], max_tokens=6))
    engine.add(request(1, [5, 5, 5, 5, 5, 96, 5], max_tokens=6))
    answers = drain(engine)
    assert answers[0] == alone
    assert answers[1] == ([], FinishReason.ERROR)
    assert any(is_ahead(engine))


def test_a_sequence_that_has_ended_cannot_fail_the_others() -> None:
    engine = make_engine(options={"script": "7,8,9,10", "raise_on": "8"})
    engine.add(request(0, [1, 2], max_tokens=9, stop_token_ids=(8,)))
    engine.add(request(1, [3], max_tokens=1))
    answers = drain(engine)
    assert answers[0] == ([7, 8], FinishReason.STOP), "its surplus step raises, and nobody is told"
    assert answers[1] == ([7], FinishReason.LENGTH)
    assert engine.stats.num_failed == 0


def test_a_chip_lost_under_way_ends_the_engine() -> None:
    engine = make_engine(options={"lose_chip_after": "2"})
    engine.add(request(0, [1]))
    engine.step()
    engine.step()
    with pytest.raises(ChipError, match="lost"):
        engine.step()


def test_joules_go_to_living_sequences_and_add_up() -> None:
    clock = FakeClock()

    class Slow(Chip):
        def execute(self, batch: StepBatch) -> object:  # type: ignore[override]
            raise AssertionError("nothing fails here")

        def submit(self, batch: StepBatch) -> PendingStep:
            clock.advance(0.1)
            return super().submit(batch)

    parts = {"num_blocks": 64, "block_size": 4, "vocab_size": VOCAB, "max_context": 200}
    chip = Slow(**parts, options=FakeOptions((("script", "7,8,9"),)))
    ledger = StepLedger(ConstantReader(50, detail="", clock=clock), clock=clock)
    engine = Engine(chip, EngineSettings(), clock, ledger)
    engine.add(request(1, [1, 2], max_tokens=40))
    engine.add(request(2, [1, 2], max_tokens=40, stop_token_ids=(8,)))
    drain(engine)
    engine.settle_energy()
    stats = engine.stats
    assert (stats.request_energy_j or 0) + (stats.idle_energy_j or 0) == pytest.approx(stats.chip_energy_j, rel=0.01)
    assert not ledger._joules
    assert not ledger._seconds


def test_an_engine_is_closed_when_no_step_uses_the_chip_any_more() -> None:
    engine = make_engine(options={"lose_chip_after": "2"})
    engine.add(request(0, [1]))
    engine.step()
    assert isinstance(engine.executor, Chip)
    assert len(engine.executor._waiting) == 1
    engine.close()
    assert not engine.executor._waiting
    engine.close()
