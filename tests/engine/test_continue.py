"""A sequence that one engine began and another goes on with: tokens, logprobs and ends are those of an unbroken run."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.backends.fake import FakeExecutor, FakeOptions
from mxn.core import host_sampler
from mxn.core.batch import StepBatch, StepResult
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest
from mxn.engine.engine import Engine, EngineSettings
from mxn.errors import RequestError

VOCAB = 61


class SampledExecutor(FakeExecutor):
    """Logits are a hash of the ids that the block table holds; tokens are drawn from them by the real sampler."""

    def execute(self, batch: StepBatch) -> StepResult:
        tokens = []
        for step in batch.sequences:
            context = self._cache.reshape(-1)[self._write(step)]
            if step.is_sampled:
                rng = np.random.default_rng(zlib.crc32(context.tobytes()))
                tokens += host_sampler.sample(3 * rng.standard_normal((1, VOCAB)), [step]).tokens
        return StepResult(tokens=tuple(tokens))


def make_engine(**fields: Any) -> Engine:
    executor = SampledExecutor(num_blocks=64, block_size=4, vocab_size=VOCAB, max_context=100, options=FakeOptions(()))
    return Engine(executor, EngineSettings(**fields))


def run(engine: Engine, request: SequenceRequest, max_outputs: int | None = None) -> list[SequenceOutput]:
    """Outputs until the end, or until so many came."""
    engine.add(request)
    outputs: list[SequenceOutput] = []
    while engine.has_work and (max_outputs is None or len(outputs) < max_outputs):
        outputs += engine.step()
        engine.check_integrity()
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def logprobs(outputs: list[SequenceOutput]) -> list[Any]:
    return [entry for output in outputs for entry in output.logprobs]


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 24))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.9])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
        logit_bias=draw(st.sampled_from([(), ((3, 5.0), (7, -100.0))])),
        seed=draw(st.integers(0, 2**63 - 1)),
        num_logprobs=draw(st.sampled_from([None, 0, 3])),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=8))),
    )


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    sampling=samplings(),
    cut=st.integers(0, 24),
    prefix_cache=st.booleans(),
    max_step_tokens=st.integers(1, 32),
)
def test_a_cut_sequence_ends_as_if_nothing_had_happened(
    prompt: list[int], sampling: SamplingParams, cut: int, prefix_cache: bool, max_step_tokens: int
) -> None:
    request = SequenceRequest(seq_id=1, prompt_token_ids=prompt, sampling=sampling)
    whole = run(make_engine(), request)
    head = run(make_engine(), request, max_outputs=cut)[:cut]
    if head and head[-1].finish_reason is not None:
        return  # it had ended before
    other = make_engine(prefix_cache=prefix_cache, max_step_tokens=max_step_tokens)
    tail = run(other, replace(request, output_token_ids=tokens(head)))
    assert tokens(head) + tokens(tail) == tokens(whole)
    assert logprobs(head) + logprobs(tail) == logprobs(whole)
    assert tail[-1].finish_reason is whole[-1].finish_reason
    assert other.stats.num_free_blocks == other.stats.num_total_blocks


def test_the_fallback_seed_draws_what_the_same_seed_would() -> None:
    free = SamplingParams(max_tokens=20, temperature=1.0)
    request = SequenceRequest(seq_id=1, prompt_token_ids=[1, 2, 3], sampling=free, fallback_seed=99)
    seeded = replace(request, sampling=replace(free, seed=99), fallback_seed=None)
    assert tokens(run(make_engine(), request)) == tokens(run(make_engine(), seeded))


@pytest.mark.parametrize(
    ("output", "fault"),
    [([1] * 5, "output tokens are there already"), ([VOCAB], "token ids"), ([1] * 97, "limit is 99")],
)
def test_output_that_cannot_be_gone_on_with_is_refused(output: list[int], fault: str) -> None:
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    with pytest.raises(RequestError, match=fault):
        make_engine().add(
            SequenceRequest(seq_id=1, prompt_token_ids=[1, 2, 3], sampling=sampling, output_token_ids=output)
        )


@pytest.mark.torch
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2}])
def test_a_real_model_goes_on_with_identical_tokens(tmp_path: Path, sampling: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mxn.backends.cpu import CpuBackend
    from mxn.core.model import LoadSettings, Model
    from mxn.store.spec import spec_from_config

    config = LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = Model(name="tiny", folder=str(tmp_path), revision="0", spec=spec_from_config(config.to_dict()))
    backend = CpuBackend()
    load_settings = LoadSettings(kv_bytes=2**20, threads=1, quantisation="fp32")

    def engine() -> Engine:
        executor = backend.load(model, load_settings, backend.chips(), lambda phase, fraction: None)
        return Engine(executor, EngineSettings())

    params = SamplingParams(max_tokens=30, num_logprobs=2, **sampling)
    request = SequenceRequest(seq_id=1, prompt_token_ids=[5, 9, 17, 33], sampling=params)
    whole = run(engine(), request)
    assert whole[-1].finish_reason is FinishReason.LENGTH
    for cut in (1, 13, 29):
        head = whole[:cut]
        tail = run(engine(), replace(request, output_token_ids=tokens(head)))
        assert tokens(head) + tokens(tail) == tokens(whole)
