"""Every family mxn names gives the same tokens and logits on a flat paged batch as transformers one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.core.batch import SequenceStep, StepBatch  # noqa: E402
from mxn.core.request import SamplingParams  # noqa: E402

pytestmark = pytest.mark.torch

FAMILIES = [
    *["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_oss"],
    *["olmo2", "olmoe", "granite", "smollm3", "gpt2", "opt", "deepseek_v3"],
]
NUM_NEW = 8


def prompts(vocab_size: int) -> list[list[int]]:
    """Lengths 21, 14, 1 and 29; the second and last share the first eight tokens of the first."""
    generator = torch.Generator().manual_seed(1)
    first, second, third, last = (
        torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in (21, 14, 1, 29)
    )
    second[:8] = last[:8] = first[:8]
    return [first, second, third, last]


def generate(model: Any, prompt: list[int], num_new: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=num_new, do_sample=False, attention_mask=torch.ones_like(ids))
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_equal_generate(
    family: str,
    make_model: Callable[..., Any],
    load: Callable[..., Any],
    decode: Callable[..., list[list[int]]],
) -> None:
    model, saved = make_model(family)
    runner = load(saved)
    four = prompts(model.config.vocab_size)
    expected = [generate(model, prompt, NUM_NEW) for prompt in four]
    assert len({token for tokens in expected for token in tokens}) > 4, "tokens must vary for equality to mean much"
    for budget in (200, 11):
        assert decode(runner, four, NUM_NEW, budget=budget) == expected
    with_prefix = [four[0], four[1], four[3]]
    found = decode(runner, with_prefix, NUM_NEW, budget=10, shared_tokens=8)
    assert found == [expected[0], expected[1], expected[3]]

    with torch.inference_mode():
        reference = model(input_ids=torch.tensor([four[3]])).logits[0].float().log_softmax(-1)
    chosen = reference[:-1].gather(1, torch.tensor(four[3][1:])[:, None])[:, 0]
    assert torch.allclose(chosen, prompt_logprobs(runner, four[3]), atol=2e-4)


SHAPES = {
    "heads of 64": ("llama", {"head_dim": 64}),
    "heads of 80": ("mistral", {"head_dim": 80}),
    "heads of 128": ("qwen3", {"head_dim": 128}),
    "heads of 256": ("gemma3_text", {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "a quarter rotated": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    ),
    "scaled rotation": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "capped scores": ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "biases": ("qwen2", {"attention_bias": True}),
}


@pytest.mark.parametrize("attention", ["reference", "cpu-cpp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_greedy_tokens_equal_generate_for_every_shape_of_head(
    shape: str, attention: str, make_model: Callable[..., Any], decode: Callable[..., list[list[int]]], kernels: None
) -> None:
    from mxn.core.model import LoadSettings
    from mxn.runner.cpu import load_cpu_runner

    family, changes = SHAPES[shape]
    model, saved = make_model(family, **changes)
    settings = LoadSettings(quantisation="fp32", attention=attention, kv_bytes=2**23, max_num_seqs=8)
    runner = load_cpu_runner(saved, settings, cores=1, free_bytes=lambda: 2**32, progress=lambda phase, fraction: None)
    assert (runner.quantisation, runner.attention_name) == ("fp32", attention)
    four = prompts(model.config.vocab_size)
    expected = [generate(model, prompt, NUM_NEW) for prompt in four]
    assert decode(runner, four, NUM_NEW, budget=11) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_path_stays_near_fp32_and_ignores_the_batch(
    family: str, make_model: Callable[..., Any], decode: Callable[..., list[list[int]]], kernels: None
) -> None:
    from mxn.core.model import LoadSettings
    from mxn.runner.cpu import load_cpu_runner

    model, saved = make_model(family)
    settings = LoadSettings(quantisation="int8", kv_bytes=2**22, max_num_seqs=8)
    runner = load_cpu_runner(saved, settings, cores=1, free_bytes=lambda: 2**32, progress=lambda phase, fraction: None)
    assert (runner.quantisation, runner.attention_name) == ("int8", "cpu-cpp")
    four = prompts(model.config.vocab_size)
    together = decode(runner, four, NUM_NEW, budget=200)
    assert decode(runner, four, NUM_NEW, budget=11) == together
    assert [decode(runner, [prompt], NUM_NEW, budget=50)[0] for prompt in four] == together

    with torch.inference_mode():
        reference = model(input_ids=torch.tensor([four[3]])).logits[0].float().log_softmax(-1)
    chosen = reference[:-1].gather(1, torch.tensor(four[3][1:])[:, None])[:, 0]
    found = prompt_logprobs(runner, four[3])
    # Random weights leave no room for rounding, so this asks for likeness; SmolLM2's likelihood is tested apart.
    assert float(torch.corrcoef(torch.stack([chosen, found]))[0, 1]) > 0.9


def prompt_logprobs(runner: Any, prompt: list[int]) -> Any:
    """Logprobs of prompt tokens 1.., computed in chunks of ten tokens."""
    found: list[float] = []
    for start in range(0, len(prompt), 10):
        step = SequenceStep(
            seq_id=0,
            token_ids=prompt[start : start + 10],
            start=start,
            block_ids=range(-(-len(prompt) // runner.block_size)),
            is_sampled=False,
            sampling=SamplingParams(num_prompt_logprobs=0),
            seed=0,
            num_prompt_tokens=len(prompt),
            num_output_tokens=0,
            history=prompt,
        )
        result = runner.execute(StepBatch(step_id=0, sequences=(step,)))
        found += [entry.logprob for _, entries in result.prompt_logprobs for entry in entries]
    return torch.tensor(found)


def test_blocks_can_be_copied_to_go_on_elsewhere(
    make_model: Callable[..., Any], load: Callable[..., Any], tmp_path: Path
) -> None:
    _, saved = make_model("llama")
    runner = load(saved)
    prompt = prompts(saved.spec.vocab_size)[0]

    def step(start: int, blocks: list[int]) -> int:
        one = SequenceStep(
            seq_id=0,
            token_ids=prompt[start:],
            start=start,
            block_ids=blocks,
            is_sampled=True,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            num_prompt_tokens=len(prompt),
            num_output_tokens=0,
        )
        return int(runner.execute(StepBatch(step_id=0, sequences=(one,))).tokens[0].token_id)

    whole = step(0, [3, 9, 4, 7, 0, 1])
    runner.copy_kv([(3, 20), (9, 21), (4, 22), (7, 23), (0, 24)])
    assert step(20, [20, 21, 22, 23, 24, 25]) == whole


def test_warm_up_leaves_results_alone(
    make_model: Callable[..., Any], load: Callable[..., Any], decode: Callable[..., list[list[int]]]
) -> None:
    model, saved = make_model("llama")
    runner = load(saved)
    names, seconds = runner.warm_up()
    assert names
    assert seconds > 0
    four = prompts(model.config.vocab_size)
    assert decode(runner, four[:1], 4, budget=64) == [generate(model, four[0], 4)]
