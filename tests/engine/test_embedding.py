"""The engine of a model that makes vectors, over the fake embedder."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mxn.backends.fake import FakeEmbedder, FakeOptions, fake_vector
from mxn.core.request import FinishReason, SequenceOutput, SequenceRequest
from mxn.energy.attribution import StepLedger
from mxn.energy.replay import ConstantReader
from mxn.engine.embedding import BatchLimits, EmbeddingEngine
from mxn.errors import ChipError, RequestError

NAN, BROKEN = 50, 51


class CountingEmbedder(FakeEmbedder):
    def __init__(self, **options: object) -> None:
        given = tuple((name, str(value)) for name, value in options.items())
        super().__init__(vocab_size=100, max_context=16, options=FakeOptions(given))
        self._batches: list[list[list[int]]] = []

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        self._batches.append([list(text) for text in batch])
        return super().embed(batch)


def engine_with(embedder: FakeEmbedder, *texts: list[int], **limits: int) -> EmbeddingEngine:
    engine = EmbeddingEngine(embedder, BatchLimits(**limits))
    for seq_id, text in enumerate(texts):
        engine.add(SequenceRequest(seq_id=seq_id, prompt_token_ids=text))
    return engine


def run(engine: EmbeddingEngine) -> dict[int, SequenceOutput]:
    outputs: dict[int, SequenceOutput] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.seq_id not in outputs
            outputs[output.seq_id] = output
    return outputs


def test_every_text_gets_its_own_vector() -> None:
    texts = [[1], [2, 3], [1, 2, 3], [4] * 16]
    outputs = run(engine_with(CountingEmbedder(), *texts, max_step_tokens=8))
    assert [outputs[i].vector for i in range(4)] == [fake_vector(text) for text in texts]
    assert all(output.finish_reason is FinishReason.STOP for output in outputs.values())


def test_a_step_takes_texts_in_order_up_to_its_limits() -> None:
    embedder = CountingEmbedder()
    run(engine_with(embedder, [1] * 4, [2] * 4, [3], [4] * 12, [5], [6], [7], max_step_tokens=8, max_num_seqs=2))
    assert [[text[0] for text in batch] for batch in embedder._batches] == [[1, 2], [3], [4], [5, 6], [7]]


def test_a_text_that_fails_harms_no_other() -> None:
    embedder = CountingEmbedder(raise_on=BROKEN, nan_on=NAN)
    engine = engine_with(embedder, [1], [2, BROKEN], [3], [NAN, 4], [5])
    outputs = run(engine)
    assert [outputs[i].finish_reason for i in range(5)] == ["stop", "error", "stop", "error", "stop"]
    assert outputs[1].error == "the backend failed on this text: RuntimeError"
    assert outputs[3].error == "the model's output is not a number"
    assert (engine.stats.num_finished, engine.stats.num_failed) == (3, 2)


def test_wrong_answers_of_an_embedder_are_not_believed() -> None:
    class Short(CountingEmbedder):
        def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
            return [vector[:-4] for vector in super().embed(batch)]

    class Fewer(CountingEmbedder):
        def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
            return super().embed(batch)[1:]

    assert run(engine_with(Short(), [1]))[0].error == "the backend returned no vector of 8 numbers"
    assert run(engine_with(Fewer(), [1], [2]))[1].error == "the backend returned 1 vectors for 2 texts"


def test_an_abort_drops_what_has_not_begun() -> None:
    embedder = CountingEmbedder()
    engine = engine_with(embedder, [1], [2], [3], max_num_seqs=1)
    assert [output.seq_id for output in engine.step()] == [0]
    assert [output.finish_reason for output in engine.abort([0, 2, 9])] == ["abort"]
    assert list(run(engine)) == [1]
    assert embedder._batches[1] == [[2]]
    assert engine.stats.num_aborted == 1


@pytest.mark.parametrize("text", [[], [1] * 17, [-1], [100]])
def test_a_text_that_could_never_be_embedded_is_refused(text: list[int]) -> None:
    engine = engine_with(CountingEmbedder())
    with pytest.raises(RequestError):
        engine.add(SequenceRequest(seq_id=1, prompt_token_ids=text))
    assert not engine.has_work


def test_a_lost_chip_is_not_taken_for_a_broken_text() -> None:
    engine = engine_with(CountingEmbedder(lose_chip_after=1), [1], [2], max_num_seqs=1)
    engine.step()
    with pytest.raises(ChipError):
        engine.step()


def test_texts_are_charged_for_their_energy() -> None:
    ledger = StepLedger(ConstantReader(10.0, detail="test"))
    engine = EmbeddingEngine(CountingEmbedder(step_ms=150), BatchLimits(max_num_seqs=1), ledger=ledger)
    for seq_id in range(4):
        engine.add(SequenceRequest(seq_id=seq_id, prompt_token_ids=[seq_id]))
    known = [output.energy_j for output in run(engine).values() if output.energy_j is not None]
    assert known
    assert all(0.5 < energy_j < 4 for energy_j in known)  # 150 ms at 10 W, on a machine that may be busy
    engine.settle_energy()
    charged = (engine.stats.request_energy_j or 0) + (engine.stats.idle_energy_j or 0)
    assert engine.stats.chip_energy_j == pytest.approx(charged, rel=1e-3)  # the next reading settles what is left
