"""Contexts of one token and of the full length: the last block filled, the last token served, one more refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.backends.torch_executor import TorchExecutor  # noqa: E402
from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.core.request import SamplingParams, SequenceRequest  # noqa: E402
from mxn.engine.engine import Engine, EngineSettings  # noqa: E402
from mxn.errors import RequestError  # noqa: E402
from mxn.runner.cpu import load_cpu_runner  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("kernels")]

CONTEXT, BLOCK_SIZE = 128, 16
WAYS = {
    "fp32 modules": ("fp32", "auto"),
    "int8 modules": ("int8", "modules"),
    "int8 step program": ("int8", "step"),
}


def make_engine(saved: Model, way: str, **fields: Any) -> Engine:
    """Over a cache of exactly one whole context."""
    quantisation, program = WAYS[way]

    def load(kv_bytes: int) -> Any:
        settings = LoadSettings(
            quantisation=quantisation,
            kv_bytes=kv_bytes,
            block_size=BLOCK_SIZE,
            options=(("program", program), ("tune", "off")),
        )
        return load_cpu_runner(
            saved, settings, cores=1, free_bytes=lambda: 2**32, progress=lambda phase, fraction: None
        )

    large = load(2**22)
    runner = load(large.kv_bytes // large.num_blocks * (CONTEXT // BLOCK_SIZE))
    assert (runner.num_blocks, runner.max_context) == (CONTEXT // BLOCK_SIZE, CONTEXT)
    return Engine(TorchExecutor(runner), EngineSettings(prefix_cache=False, **fields))


def serve(engine: Engine, prompt: list[int], max_tokens: int) -> tuple[list[int], str | None]:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    engine.add(SequenceRequest(seq_id=0, prompt_token_ids=prompt, sampling=sampling))
    tokens: list[int] = []
    reason = None
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
            reason = output.finish_reason
        engine.check_integrity()
    return tokens, reason


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_step_tokens", [512, 48])
def test_whole_context_is_served_to_its_last_token(
    way: str, max_step_tokens: int, make_model: Callable[..., Any]
) -> None:
    model, saved = make_model("llama")
    engine = make_engine(saved, way, max_step_tokens=max_step_tokens)
    prompt = torch.randint(3, 199, (CONTEXT - 20,), generator=torch.Generator().manual_seed(5)).tolist()
    whole, reason = serve(engine, prompt, 10**6)
    assert (len(whole), reason) == (20, "length")
    for length in (CONTEXT - 1, 1):  # the longest prompt there is room for, and a context that begins with one token
        ids = (prompt + whole)[:length]
        tokens, reason = serve(engine, ids, 10**6)
        assert (len(tokens), reason) == (CONTEXT - length, "length")
        if length == CONTEXT - 1:
            assert tokens == whole[-1:]
    if way == "fp32 modules":
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + whole[:-1]])).logits[0]
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == whole


@pytest.mark.parametrize("way", WAYS)
def test_prompt_of_the_whole_context_is_refused(way: str, make_model: Callable[..., Any]) -> None:
    engine = make_engine(make_model("llama")[1], way)
    request = SequenceRequest(
        seq_id=0, prompt_token_ids=[7] * CONTEXT, sampling=SamplingParams(temperature=0.0, max_tokens=1)
    )
    with pytest.raises(RequestError, match=f"the prompt has {CONTEXT} tokens; .* the limit is {CONTEXT - 1}"):
        engine.add(request)
    tokens, reason = serve(engine, [7], 1)
    assert (len(tokens), reason) == (1, "length")
