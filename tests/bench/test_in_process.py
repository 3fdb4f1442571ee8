from collections.abc import Callable
from pathlib import Path

import pytest

from mxn.backends.fake import FAKE_W, FakeBackend
from mxn.bench.in_process import InProcessArm
from mxn.bench.quality import TEXTS, Reference, Scored, ScoringError, judge, take_reference
from mxn.bench.runner import measure
from mxn.bench.workloads import PromptMaker, parse_workloads
from mxn.core.model import LoadSettings, Model, ModelSpec


def tiny_model(folder: Path) -> Model:
    spec = ModelSpec(
        architecture="llama",
        num_layers=1,
        hidden_size=8,
        vocab_size=4000,
        num_heads=1,
        num_kv_heads=1,
        key_dim=8,
        value_dim=8,
        max_context=2048,
        num_parameters=1,
    )
    return Model(name="tiny", folder=str(folder), revision="0", spec=spec)


async def test_engine_in_process_runs_the_same_workloads(
    tmp_path: Path, write_word_tokenizer: Callable[..., Path]
) -> None:
    prompts = PromptMaker(write_word_tokenizer(tmp_path), seed=0)
    model = tiny_model(tmp_path)
    backend = FakeBackend()
    arm = InProcessArm.load(backend, backend.chips()[0], model, LoadSettings(), label="fake engine")
    found = await measure([arm], parse_workloads("quick,W4,W4off"), prompts, repetitions=2)
    arm.close()
    by_name = {r.workload.name: r for r in found}
    assert all(r.faults == () for r in found)
    assert by_name["quick8"].num_output_tokens == 2 * 16 * 32
    assert by_name["W4off"].num_cached_tokens == 0
    cached = by_name["W4"].num_cached_tokens
    assert cached is not None
    assert cached >= 2 * 12 * 768
    assert by_name["W4"].mean_watts.value == pytest.approx(FAKE_W)
    assert by_name["W4"].mean_watts.provenance == "simulated"


async def test_engine_in_process_passes_the_gate_of_its_own_answers_and_of_no_other(
    tmp_path: Path, write_word_tokenizer: Callable[..., Path]
) -> None:
    write_word_tokenizer(tmp_path)
    backend, model = FakeBackend(), tiny_model(tmp_path)
    chip, other_words = backend.chips()[0], LoadSettings(options=(("script", "5,6,7"),))
    own = InProcessArm.load(backend, chip, model, LoadSettings(), label="fake")
    other = InProcessArm.load(backend, chip, model, other_words, label="other")
    with pytest.raises(ScoringError, match="log-likelihoods"):
        await take_reference(own.asker(), "fake")
    texts = tuple([text + await own.asker().continue_text(text) for text in TEXTS])
    reference = Reference(name="fake", texts=texts, scores=(Scored(logliks=(-1.0,), tops=("a",)),))
    quality = await judge(own.asker(), reference)
    assert quality.is_passed
    assert "100%" in quality.note
    assert not (await judge(other.asker(), reference)).is_passed
    own.close()
    other.close()
