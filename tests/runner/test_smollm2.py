"""A real model: tokens equal to transformers' generate(), and what int8 costs in likelihood."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.core.batch import SequenceStep, StepBatch  # noqa: E402
from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.core.request import SamplingParams  # noqa: E402
from mxn.runner.cpu import load_cpu_runner  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.model]

NUM_NEW = 10
QUESTIONS = (
    "What is the capital of France?",
    "Once upon a time, in a village by the sea, there lived",
    "List three prime numbers, then explain in one sentence why the number one is not among them, and who minds.",
    "x",
)
CODE_MODULES = "heapq bisect textwrap queue shlex"
"""Their source text: it differs a little between versions of Python, for both sides of a comparison alike."""

TEXT_MODULES = "decimal argparse random heapq difflib string textwrap zipfile doctest pickle statistics optparse"


def encode(folder: str, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids)


def load(model: Model, quantisation: Any, **changes: Any) -> Any:
    settings = LoadSettings(quantisation=quantisation, kv_bytes=256 * 2**20, max_step_tokens=512, **changes)
    return load_cpu_runner(model, settings, cores=1, free_bytes=lambda: 2**34, progress=lambda phase, fraction: None)


def generate(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, attention_mask=torch.ones_like(ids))
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def test_greedy_tokens_equal_generate(smollm2: Model, decode: Callable[..., list[list[int]]]) -> None:
    prompts = [encode(smollm2.folder, text) for text in QUESTIONS]
    shared = encode(
        smollm2.folder, "You are a helpful assistant who answers in few words and never guesses. Question: "
    )
    with_prefix = [shared + prompt for prompt in prompts[:3]]
    expected = generate(smollm2.folder, [*prompts, *with_prefix])
    runner = load(smollm2, "fp32")
    for budget in (512, 17):
        assert decode(runner, prompts, NUM_NEW, budget=budget) == expected[:4]
    assert decode(runner, with_prefix, NUM_NEW, budget=13, shared_tokens=16) == expected[4:]


def mean_nll(runner: Any, ids: list[int]) -> float:
    """Mean negative log-likelihood over windows of 1,000 tokens, in chunks of 500."""
    total, count = 0.0, 0
    for at in range(0, len(ids), 1000):
        window = ids[at : at + 1000]
        for start in range(0, len(window), 500):
            step = SequenceStep(
                seq_id=0,
                token_ids=window[start : start + 500],
                start=start,
                block_ids=range(-(-len(window) // runner.block_size)),
                is_sampled=False,
                sampling=SamplingParams(num_prompt_logprobs=0),
                seed=0,
                num_prompt_tokens=len(window),
                num_output_tokens=0,
                history=window,
            )
            (found,) = runner.execute(StepBatch(step_id=0, sequences=(step,))).prompt_logprobs
            total -= sum(entry.logprob for entry in found[1])
            count += len(found[1])
    return total / count


def prose() -> str:
    text = "\n\n".join(importlib.import_module(name).__doc__ or "" for name in TEXT_MODULES.split())
    return re.sub(r">>>.*|\.\.\. .*", "", text)


def code() -> str:
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES.split())


@pytest.mark.parametrize("text", [prose, code])
def test_int8_likelihood_is_within_two_percent_of_fp32(text: Callable[[], str], smollm2: Model, kernels: None) -> None:
    ids = encode(smollm2.folder, text())[:2000]
    assert len(ids) == 2000
    fp32 = mean_nll(load(smollm2, "fp32"), ids)
    int8 = mean_nll(load(smollm2, "int8"), ids)
    print(f"mean negative log-likelihood of {text.__name__}: fp32 {fp32:.4f}, int8 {int8:.4f} ({int8 / fp32 - 1:+.2%})")
    assert abs(int8 / fp32 - 1) < 0.02


def test_the_same_int8_tokens_whatever_else_is_in_the_batch(
    smollm2: Model, decode: Callable[..., list[list[int]]], kernels: None
) -> None:
    prompts = [encode(smollm2.folder, text) for text in QUESTIONS]
    runner = load(smollm2, "int8")
    sampling = SamplingParams(temperature=0.9, top_p=0.95)
    seeds = [11, 12, 13, 14]
    together = decode(runner, prompts, NUM_NEW, budget=19, sampling=sampling, seeds=seeds)
    alone = [
        decode(runner, [prompt], NUM_NEW, budget=512, sampling=sampling, seeds=[seed])[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == alone


def test_step_program_has_the_likelihood_of_the_modules(smollm2: Model, kernels: None) -> None:
    ids = encode(smollm2.folder, prose())[:2000]
    step, modules = load(smollm2, "int8"), load(smollm2, "int8", options=(("program", "modules"),))
    assert step.notes[-1].startswith("forward: step program")
    found, expected = mean_nll(step, ids), mean_nll(modules, ids)
    print(f"mean negative log-likelihood: modules {expected:.4f}, step program {found:.4f}")
    assert abs(found / expected - 1) < 0.005
