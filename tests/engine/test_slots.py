"""The engine over whole-sequence slots, on the fake executor: tokens are a hash of what the slots really hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.backends.base import KVCopy
from mxn.backends.fake import FakeOptions, FakeSlotExecutor, fake_next_token
from mxn.core.batch import StepBatch, StepResult
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest
from mxn.engine.engine import Engine, EngineSettings
from mxn.engine.slots import common_prefix
from mxn.errors import ChipError

VOCAB = 97


class RecordingExecutor(FakeSlotExecutor):
    """Remembers every step, as (slot, start, tokens), and every copy; counts steps with gaps among running slots."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.batches: list[list[tuple[int, int, int]]] = []
        self.copies: list[KVCopy] = []
        self.num_gaps = 0
        self.engine: Engine | None = None

    def execute(self, batch: StepBatch) -> StepResult:
        self.batches.append([(s.slot, s.start, len(s.token_ids)) for s in batch.sequences])
        assert self.engine is not None
        held = [sequence.slot for sequence in self.engine._scheduler.running]
        self.num_gaps += max(held) - min(held) + 1 > len(held)
        return super().execute(batch)

    def copy_kv(self, copies: list[KVCopy]) -> None:  # type: ignore[override]
        self.copies += copies
        super().copy_kv(copies)


def make_engine(
    num_slots: int = 4, max_tokens: int = 200, options: dict[str, str] | None = None, **fields: object
) -> tuple[Engine, RecordingExecutor]:
    executor = RecordingExecutor(
        num_slots=num_slots,
        max_tokens=max_tokens,
        vocab_size=VOCAB,
        options=FakeOptions(tuple((options or {}).items())),
    )
    executor.engine = Engine(executor, EngineSettings(has_mixed_steps=False, **fields))  # type: ignore[arg-type]
    return executor.engine, executor


def request(seq_id: int, prompt: list[int], max_tokens: int = 4, **fields: object) -> SequenceRequest:
    extra = {k: fields.pop(k) for k in ("cache_salt", "priority") if k in fields}
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)  # type: ignore[arg-type]
    return SequenceRequest(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling, **extra)  # type: ignore[arg-type]


def oracle(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(fake_next_token(np.asarray(ids, dtype=np.int32), 0, VOCAB))
    return ids[len(prompt) :]


def drain(engine: Engine, max_steps: int = 2000) -> dict[int, list[SequenceOutput]]:
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


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, object]:
    families = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    count = len(families)
    return {
        "num_slots": draw(st.integers(1, 6)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_step_tokens": draw(st.integers(1, 24)),
        "prefix_cache": draw(st.booleans()),
        "prompts": [
            [family] * draw(st.integers(1, 40)) + draw(st.lists(st.integers(0, VOCAB - 1), max_size=12))
            for family in families
        ],
        "salts": draw(st.lists(st.sampled_from(["", "a", "b"]), min_size=count, max_size=count)),
        "max_tokens": draw(st.lists(st.integers(1, 12), min_size=count, max_size=count)),
        "priorities": draw(st.lists(st.integers(-1, 1), min_size=count, max_size=count)),
        "arrivals": sorted(draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))),
        "aborts": draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 15), max_size=3)),
        "preempts": draw(st.sets(st.integers(0, 20), max_size=3)),
        "clears": draw(st.sets(st.integers(0, 20), max_size=2)),
    }


@settings(max_examples=200, deadline=None)
@given(workloads())
def test_random_arrivals_aborts_preemptions_and_copies_change_no_token(work: dict) -> None:  # type: ignore[type-arg]
    engine, executor = make_engine(
        num_slots=work["num_slots"],
        max_tokens=70,
        max_num_seqs=work["max_num_seqs"],
        max_step_tokens=work["max_step_tokens"],
        prefix_cache=work["prefix_cache"],
    )
    pending = list(enumerate(zip(work["arrivals"], work["prompts"], strict=True)))
    outputs: dict[int, list[SequenceOutput]] = {i: [] for i, _ in pending}
    total_work = sum(len(p) + n for p, n in zip(work["prompts"], work["max_tokens"], strict=True))
    for step in range(80 + 30 * total_work):
        while pending and pending[0][1][0] <= step:
            i, (_, prompt) = pending.pop(0)
            fields = {"priority": work["priorities"][i], "cache_salt": work["salts"][i]}
            engine.add(request(i, prompt, max_tokens=work["max_tokens"][i], **fields))
        if step in work["preempts"]:
            engine._scheduler.preempt_last()
        if step in work["clears"]:
            engine.reset_prefix_cache()
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
    assert executor.num_gaps == 0
    assert engine.stats.num_free_blocks == engine.stats.num_total_blocks == work["num_slots"]


@given(st.lists(st.integers(0, 2), max_size=200), st.lists(st.integers(0, 2), max_size=200), st.integers(0, 200))
def test_the_common_prefix_is_found_wherever_it_ends(first: list[int], second: list[int], at: int) -> None:
    second = first[:at] + second
    limit = min(len(first), len(second))
    found = common_prefix(first, second, limit)
    assert first[:found] == second[:found]
    assert found == limit or first[found] != second[found]


def test_running_sequences_stand_side_by_side() -> None:
    engine, executor = make_engine(num_slots=6, prefix_cache=False)
    for i in range(6):
        engine.add(request(i, [i] * 9, max_tokens=3 + 4 * (i % 3)))
    outputs = drain(engine)
    assert {i: tokens(o) for i, o in outputs.items()} == {i: oracle([i] * 9, 3 + 4 * (i % 3)) for i in range(6)}
    assert executor.num_gaps == 0
    assert executor.copies, "sequences that ended in the middle left gaps"


def test_prompt_chunks_and_decoding_take_turns() -> None:
    engine, executor = make_engine(num_slots=2, max_step_tokens=10, prefix_cache=False)
    engine.add(request(0, [1] * 5, max_tokens=20))
    engine.step()
    engine.add(request(1, [2] * 50, max_tokens=2))
    drain(engine)
    kinds = ["prompt" if any(n > 1 for *_, n in batch) else "decode" for batch in executor.batches]
    assert kinds[1:9] == ["decode", "prompt"] * 4 or kinds[1:9] == ["prompt", "decode"] * 4


def test_a_running_sequence_gives_its_prefix_by_copy() -> None:
    engine, executor = make_engine()
    engine.add(request(0, [5] * 40, max_tokens=30))
    engine.step()
    engine.add(request(1, [5] * 40 + [6], max_tokens=2))
    assert tokens(drain(engine)[1]) == oracle([5] * 40 + [6], 2)
    assert engine.stats.num_cached_tokens == 40
    assert executor.copies[0].num_tokens == 40


def test_the_next_turn_of_a_conversation_continues_in_place() -> None:
    engine, executor = make_engine()
    engine.add(request(0, [3] * 20, max_tokens=9))
    answer = tokens(drain(engine)[0])
    engine.add(request(1, [3] * 20 + answer + [7] * 5, max_tokens=2))
    outputs = drain(engine)[1]
    assert outputs[0].num_cached_tokens == 28  # the last token's KV was never computed
    assert executor.copies == []
    assert tokens(outputs) == oracle([3] * 20 + answer + [7] * 5, 2)


def test_a_short_common_start_does_not_destroy_a_long_conversation() -> None:
    engine, _ = make_engine(num_slots=3)
    engine.add(request(0, [1] * 10 + [2] * 60, max_tokens=1))
    drain(engine)
    engine.add(request(1, [1] * 10 + [4] * 10, max_tokens=1))
    assert drain(engine)[1][0].num_cached_tokens == 10
    engine.add(request(2, [1] * 10 + [2] * 60 + [3], max_tokens=1))
    assert drain(engine)[2][0].num_cached_tokens == 70


def test_a_shared_prefix_is_computed_once_even_when_requests_arrive_together() -> None:
    engine, _ = make_engine(max_step_tokens=20)
    shared = [5] * 64
    for i in range(4):
        engine.add(request(i, [*shared, i, i], max_tokens=3))
    outputs = drain(engine)
    assert {i: tokens(o) for i, o in outputs.items()} == {i: oracle([*shared, i, i], 3) for i in range(4)}
    assert engine.stats.num_computed_tokens == 64 + 4 * (2 + 2)


@pytest.mark.parametrize(("salt", "cached"), [("tenant-a", 15), ("tenant-b", 0)])
def test_tenants_never_share_slots_content(salt: str, cached: int) -> None:
    engine, _ = make_engine()
    engine.add(request(0, [3] * 16, max_tokens=1, cache_salt="tenant-a"))
    drain(engine)
    engine.add(request(1, [3] * 16, max_tokens=1, cache_salt=salt))
    assert drain(engine)[1][0].num_cached_tokens == cached


def test_the_prefix_unused_for_longest_is_lost_first() -> None:
    engine, _ = make_engine(num_slots=2)
    for i in range(3):
        engine.add(request(i, [i] * 16, max_tokens=1))
        drain(engine)
    engine.add(request(3, [1] * 16, max_tokens=1))
    engine.add(request(4, [0] * 16, max_tokens=1))
    outputs = drain(engine)
    assert outputs[3][0].num_cached_tokens == 15
    assert outputs[4][0].num_cached_tokens == 0


def test_forgetting_covers_what_running_sequences_hold() -> None:
    engine, _ = make_engine()
    engine.add(request(0, [3] * 16, max_tokens=8))
    engine.step()
    engine.reset_prefix_cache()
    drain(engine)
    engine.add(request(1, [3] * 16, max_tokens=1))
    assert drain(engine)[1][0].num_cached_tokens == 0


def test_prompt_logprobs_switch_reuse_off() -> None:
    engine, _ = make_engine()
    for i in range(2):
        engine.add(request(i, [3] * 16, max_tokens=1, num_prompt_logprobs=1))
        assert drain(engine)[i][0].num_cached_tokens == 0


def test_more_sequences_than_slots_wait_their_turn() -> None:
    engine, executor = make_engine(num_slots=2)
    for i in range(7):
        engine.add(request(i, [i] * 5, max_tokens=3))
    outputs = drain(engine)
    assert {i: tokens(o) for i, o in outputs.items()} == {i: oracle([i] * 5, 3) for i in range(7)}
    assert max(len(batch) for batch in executor.batches) == 2


def test_the_longest_sequence_fills_its_slot_and_ends_there() -> None:
    engine, _ = make_engine(num_slots=2, max_tokens=12)
    engine.add(request(0, [1] * 8, max_tokens=50))
    outputs = drain(engine)[0]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert len(tokens(outputs)) == 4


def test_a_copy_that_fails_ends_the_replica_not_in_wrong_tokens() -> None:
    engine, executor = make_engine()
    engine.add(request(0, [5] * 40, max_tokens=30))
    engine.step()

    def fail(copies: object) -> None:
        raise RuntimeError("no")

    executor.copy_kv = fail  # type: ignore[method-assign, assignment]
    engine.add(request(1, [5] * 40 + [6], max_tokens=2))
    with pytest.raises(ChipError, match="copying KV"):
        engine.step()
