"""Tiny random models of many families, and a loop that decodes with a runner the way the engine does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mxn.core.batch import SequenceStep, StepBatch, StepResult  # noqa: E402
from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.core.request import SamplingParams  # noqa: E402
from mxn.store.spec import spec_from_config  # noqa: E402

VOCAB_SIZE = 199
_USUAL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": 7, "head_dim": 16},
    "gemma2": {"sliding_window": 7, "layer_types": _MIXED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 7, "layer_types": _MIXED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt_oss": {
        "sliding_window": 7,
        "layer_types": _MIXED,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt2": {"n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 24,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads only get in each other's way on models this small."""
    torch.set_num_threads(1)


@pytest.fixture
def make_config() -> Callable[..., Any]:
    """Config of a tiny model of a family, with changes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def make(family: str, **changes: Any) -> Any:
        return CONFIG_MAPPING[family](**(_USUAL | FAMILIES.get(family, {}) | changes))

    return make


@pytest.fixture
def make_model(tmp_path: Path, make_config: Callable[..., Any]) -> Callable[..., tuple[Any, Model]]:
    """A tiny random model under eager attention, and the same one saved as a folder."""
    from transformers import AutoModelForCausalLM

    def make(family: str, **changes: Any) -> tuple[Any, Model]:
        config = make_config(family, **changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:  # wide enough that greedy tokens vary
                    parameter.data.normal_(std=0.6 if "embed" in name else 2.0 * parameter.shape[-1] ** -0.5)
                elif "bias" in name or "sink" in name:
                    parameter.data.normal_(std=0.3)
        folder = tmp_path / family
        model.save_pretrained(folder)
        spec = spec_from_config(config.to_dict())
        return model, Model(name=family, folder=str(folder), revision="0", spec=spec)

    return make


@pytest.fixture
def kernels() -> None:
    """Skips where the C++ kernels cannot be built."""
    from mxn.attention.paged import prepare_cpu_kernels
    from mxn.errors import KernelUnavailableError

    try:
        prepare_cpu_kernels()
    except KernelUnavailableError as error:
        pytest.skip(f"no C++ kernels: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M-Instruct in the model cache, fetched on first use."""
    from mxn.errors import DownloadError
    from mxn.store.fetch import fetch

    try:
        return fetch("smollm2-135m-instruct")
    except DownloadError as error:
        pytest.skip(f"the weights cannot be fetched here: {error}")


@pytest.fixture
def load() -> Callable[..., Any]:
    """Loads a model folder as fp32 over reference attention with blocks of four tokens."""
    from functools import partial

    from mxn.attention.reference import ReferenceAttention
    from mxn.runner.torch_runner import LoadPlan, load_runner

    def load_it(model: Model, **settings: Any) -> Any:
        plan = LoadPlan(
            device="cpu",
            dtype=torch.float32,
            quantisation="fp32",
            make_attention=partial(ReferenceAttention, dtype=torch.float32),
            block_bytes=ReferenceAttention.bytes_per_block,
            free_bytes=lambda: 2**30,
        )
        chosen = LoadSettings(**({"block_size": 4, "max_num_seqs": 8} | settings))
        return load_runner(model, chosen, plan, lambda phase, fraction: None)

    return load_it


@pytest.fixture
def decode() -> Callable[..., list[list[int]]]:
    """Decodes prompts with a runner: continuous batching, chunked prefill under a budget, shared prefix blocks."""

    def run(
        runner: Any,
        prompts: Sequence[Sequence[int]],
        num_new: int,
        *,
        budget: int,
        shared_tokens: int = 0,
        sampling: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        size = runner.block_size
        each = -(-(max(map(len, prompts)) + num_new) // size)
        free = list(range(runner.num_blocks))[::-1]
        shared = [free.pop() for _ in range(shared_tokens // size)]
        tables = [shared + [free.pop() for _ in range(each - len(shared))] for _ in prompts]
        tokens = [list(prompt) for prompt in prompts]
        done = [0] + [len(shared) * size] * (len(prompts) - 1)
        if shared:  # the first prompt fills the blocks the others start from
            execute(runner, [0], tokens, done, tables, prompts, budget=len(prompts[0]), sampling=sampling, seeds=seeds)
        while any(len(t) - len(p) < num_new for t, p in zip(tokens, prompts, strict=True)):
            alive = [i for i, t in enumerate(tokens) if len(t) - len(prompts[i]) < num_new]
            execute(runner, alive, tokens, done, tables, prompts, budget=budget, sampling=sampling, seeds=seeds)
        return [t[len(p) :] for t, p in zip(tokens, prompts, strict=True)]

    return run


def execute(
    runner: Any,
    alive: Sequence[int],
    tokens: list[list[int]],
    done: list[int],
    tables: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    *,
    budget: int,
    sampling: SamplingParams | None,
    seeds: Sequence[int] | None,
) -> StepResult:
    """One step over the sequences `alive`, as many tokens as the budget allows; appends what was drawn."""
    steps = []
    for i in alive:
        count = min(len(tokens[i]) - done[i], budget)
        budget -= count
        if not count:
            continue
        steps.append(
            SequenceStep(
                seq_id=i,
                token_ids=tokens[i][done[i] : done[i] + count],
                start=done[i],
                block_ids=tables[i],
                is_sampled=done[i] + count == len(tokens[i]),
                sampling=sampling or SamplingParams(temperature=0.0),
                seed=seeds[i] if seeds else 0,
                num_prompt_tokens=len(prompts[i]),
                num_output_tokens=len(tokens[i]) - len(prompts[i]),
                history=tokens[i],
            )
        )
        done[i] += count
    result: StepResult = runner.execute(StepBatch(step_id=0, sequences=tuple(steps)))
    assert not result.failed
    for token in result.tokens:
        tokens[token.seq_id].append(token.token_id)
    return result
