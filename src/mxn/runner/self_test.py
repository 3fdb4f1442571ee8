"""Finds out at load time whether an architecture gives a flat ragged batch the logits of one sequence at a time.

A model of the same config class, shrunk to two layers with random weights, runs twice: through transformers' own eager
attention, one sequence after another; and through mxn's attention function over a paged cache, in chunks that mix the
sequences. It takes well under a second and holds for architectures nobody here has heard of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mxn.attention.reference import ReferenceAttention
from mxn.core.batch import SequenceStep, StepBatch
from mxn.core.request import SamplingParams
from mxn.errors import MxnError, UnsupportedModelError
from mxn.runner.attention_hook import ATTENTION_NAME, discover_layers, register
from mxn.runner.forward import ModuleForward
from mxn.runner.inputs import build_inputs
from mxn.store.spec import layer_windows

_LENGTHS = (9, 14)
_CHUNKS = ((5, 4, 0), (6, 7, 1))
"""Tokens of each sequence in each of three steps: both mixed, both continued, a lone decode."""
_BLOCK_SIZE = 4
_WINDOW = 4
_VOCAB_SIZE = 128
_HEAD_DIM = 16
_TOLERANCE = 2e-3
"""Largest difference of logits over their scale. Right architectures reach 1e-5, wrong ones 0.1 and more."""


def check_architecture(config: PreTrainedConfig) -> None:
    """Runs the self-test.

    Raises: UnsupportedModelError with what was found, when the architecture would be served wrongly.
    """
    faults = []
    # A tie between experts can fall either way by rounding: an architecture is wrong if it is wrong twice.
    for seed in (0, 1):
        try:
            error = _difference(config, seed)
        except MxnError:
            raise
        except Exception as problem:  # any way in which foreign model code can stumble over a flat batch
            raise UnsupportedModelError(
                f"{config.model_type} cannot be served: a small model of this architecture failed in the self-test "
                f"with {type(problem).__name__}: {problem}"
            ) from problem
        if error <= _TOLERANCE:
            return
        faults.append(f"{error:.2g}")
    raise UnsupportedModelError(
        f"{config.model_type} would be served wrongly: in the self-test (transformers {transformers.__version__}) the "
        f"logits of a flat batch differ from those of single sequences by {' and '.join(faults)} of their scale, "
        f"expected under {_TOLERANCE:g}"
    )


def _difference(config: PreTrainedConfig, seed: int) -> float:
    register()
    flat, single = _build_pair(config, seed)
    windows = layer_windows(flat.config.to_dict())
    layers = discover_layers(flat, windows)
    num_blocks = sum(-(-length // _BLOCK_SIZE) for length in _LENGTHS)
    attention = ReferenceAttention(layers, num_blocks, _BLOCK_SIZE)
    forward = ModuleForward(flat, attention, windows)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, _VOCAB_SIZE, (length,), generator=generator).tolist() for length in _LENGTHS]
    with torch.inference_mode():
        expected = [single(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
        found = _run_flat(forward, prompts)
    scale = max(float(logits.std()) for logits in expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return worst / scale if scale > 0 else float("inf")


def _run_flat(forward: Callable[..., torch.Tensor], prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of every token of every prompt, computed in chunks over interleaved blocks."""
    sampling = SamplingParams(num_prompt_logprobs=0)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for step_id in range(len(_CHUNKS[0])):
        sizes = [chunks[step_id] for chunks in _CHUNKS]
        sequences = tuple(
            SequenceStep(
                seq_id=index,
                token_ids=prompts[index][done[index] : done[index] + size],
                start=done[index],
                block_ids=_blocks(index),
                is_sampled=False,
                sampling=sampling,
                seed=0,
                num_prompt_tokens=len(prompts[index]),
                num_output_tokens=0,
            )
            for index, size in enumerate(sizes)
            if size
        )
        inputs = build_inputs(StepBatch(step_id=step_id, sequences=sequences), _BLOCK_SIZE, torch.device("cpu"))
        logits = forward(inputs)
        for sequence, (first, last) in zip(sequences, inputs.row_ranges, strict=True):
            rows[sequence.seq_id].append(logits[first:last])
            done[sequence.seq_id] += len(sequence.token_ids)
    return [torch.cat(parts).float() for parts in rows]


def _blocks(index: int) -> list[int]:
    """Blocks of both sequences lie between each other, the second one's in falling order."""
    first, second = (-(-length // _BLOCK_SIZE) for length in _LENGTHS)
    own = [list(range(0, 2 * first, 2)), [b for b in range(first + second) if b % 2 or b >= 2 * first][::-1]]
    return own[index]


def _build_pair(config: PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The shrunken model under mxn's attention, and the same weights under eager attention."""
    problems = []
    for shrink in (_shrink, _shrink_depth):
        try:
            small = shrink(config)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                flat = _build(small, ATTENTION_NAME)
                single = _build(small, "eager")
                _randomise(single)
            flat.load_state_dict(single.state_dict())
            return flat, single
        except MxnError:
            raise
        except Exception as error:  # any way in which a foreign config class can refuse its own fields
            problems.append(f"{type(error).__name__}: {error}")
    raise UnsupportedModelError(
        f"{config.model_type}: no small model of this architecture could be built for the self-test "
        f"({'; '.join(problems)}), so nothing shows that it would be served rightly"
    )


def _build(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    # Copied: building a second model from one config object would switch the first one's attention.
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
    )
    return model.eval().requires_grad_(False)


def _randomise(model: PreTrainedModel) -> None:
    """Weights large enough that every part of the model moves the logits."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            is_table = "embed" in name or "wte" in name or "wpe" in name
            parameter.normal_(std=1.0 if is_table else 1.5 * parameter.shape[-1] ** -0.5)
        elif "bias" in name or "sink" in name:
            parameter.normal_(std=0.3)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def _shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Two layers of every kind there is, with few and small heads; grouping and head kinds stay as they are."""
    small = _shrink_depth(config)
    heads = int(config.num_attention_heads)
    group = max(1, min(heads // int(getattr(config, "num_key_value_heads", None) or heads), 8))
    kv_heads = 1 if getattr(config, "num_key_value_heads", None) == 1 else 2
    num_heads = kv_heads * group
    hidden = num_heads * _HEAD_DIM
    changes: dict[str, Any] = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "head_dim": _HEAD_DIM,
        "intermediate_size": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": hidden,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "kv_lora_rank": 24,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "qk_head_dim": 24,
        "num_local_experts": 8,
        "num_experts": 8,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    }
    if getattr(config, "kv_lora_rank", None) is not None:
        changes |= {"num_key_value_heads": num_heads, "head_dim": 8}
    for name, value in changes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, value)
    return small


def _shrink_depth(config: PreTrainedConfig) -> PreTrainedConfig:
    """Two layers, a small vocabulary and a short window; widths as they are."""
    small = copy.deepcopy(config)
    num_layers = int(config.num_hidden_layers)
    windows = layer_windows(config.to_dict())
    kept = _pick_layers(config, windows)
    for name, value in list(vars(small).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers and num_layers > 2:
            setattr(small, name, [value[layer] for layer in kept])
    small.num_hidden_layers = len(kept)
    small.vocab_size = _VOCAB_SIZE
    if any(window is not None for window in windows):
        small.sliding_window = _WINDOW
    if getattr(small, "first_k_dense_replace", None):
        small.first_k_dense_replace = 1
    if getattr(small, "max_window_layers", None):
        small.max_window_layers = 1
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    _plain_rotation(small)
    return small


def _pick_layers(config: PreTrainedConfig, windows: Sequence[int | None]) -> list[int]:
    """The first layer and the next one of another kind."""
    num_layers = len(windows)
    lists = [v for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == num_layers]
    kinds = [(windows[layer], *(str(values[layer]) for values in lists)) for layer in range(num_layers)]
    by_window = next((layer for layer in range(num_layers) if windows[layer] != windows[0]), None)
    other = next((layer for layer in range(num_layers) if kinds[layer] != kinds[0]), None)
    second = by_window if by_window is not None else other
    return [0, second if second is not None else 1] if num_layers > 1 else [0]


def _plain_rotation(config: PreTrainedConfig) -> None:
    """Rotary embeddings whose tables depend on head size or length become plain: attention is what is tested."""
    rope = getattr(config, "rope_parameters", None)
    for part in (rope, *(rope.values() if isinstance(rope, dict) else ())):
        if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
            kept = {k: part[k] for k in ("rope_theta", "partial_rotary_factor") if k in part}
            part.clear()
            part.update(kept, rope_type="default")
