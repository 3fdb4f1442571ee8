"""What GGUF calls facts and weights of the architectures read fast here, and what llama.cpp did to the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mxn.errors import ModelError
from mxn.runner.gguf_file import GgufFile

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SKIPPED = ("rope_freqs.weight",)  # told by the config's rope_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How to turn one GGUF architecture into a Hugging Face model.

    config: config.json out of the file; None when this file has something only transformers' own path may know.
    layer_names: GGUF's names of a layer's weights that differ from most models'.
    restore: undoes what llama.cpp's converter did to a weight, given its GGUF name.
    """

    config: Callable[[GgufFile], dict[str, Any] | None]
    layer_names: Mapping[str, str]
    restore: Callable[[str, np.ndarray, Mapping[str, Any]], np.ndarray]

    def weight_name(self, name: str) -> str | None:
        """Hugging Face's name for a tensor, "" for one that is not a weight, None when it is unknown here."""
        if name in _SKIPPED:
            return ""
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            return None
        if stem in _TOP_NAMES:
            return f"{_TOP_NAMES[stem]}.{leaf}"
        block, _, part = stem.partition(".")[2].partition(".")
        target = (_LAYER_NAMES | dict(self.layer_names)).get(part)
        return f"model.layers.{block}.{target}.{leaf}" if stem.startswith("blk.") and target else None


def _llama_config(file: GgufFile) -> dict[str, Any] | None:
    meta = file.metadata
    if meta.get("llama.expert_count"):
        return None
    rope = _rope_parameters(file, "llama")
    if rope is None:
        return None
    config = _common_config(file, "llama")
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": _head_dim(meta, "llama", config),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "rope_parameters": rope,
    }


def _gemma3_config(file: GgufFile) -> dict[str, Any] | None:
    meta = file.metadata
    rope = _rope_parameters(file, "gemma3")
    if rope is None:
        return None
    config = _common_config(file, "gemma3")
    head_dim = _head_dim(meta, "gemma3", config)
    num_layers = config["num_hidden_layers"]
    is_27b = num_layers == 62  # the one size that scales by hidden size over heads, as llama.cpp tells it
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim,
        "sliding_window": int(meta["gemma3.attention.sliding_window"]),
        "layer_types": [
            "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(num_layers)
        ],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tie_word_embeddings": True,
    }


def _common_config(file: GgufFile, prefix: str) -> dict[str, Any]:
    meta = file.metadata

    def fact(key: str) -> Any:
        value = meta.get(f"{prefix}.{key}")
        if value is None:
            raise ModelError(f"{file.path}: expected {prefix}.{key} in its metadata, found none")
        return value

    heads = int(fact("attention.head_count"))
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": int(fact("embedding_length")),
        "intermediate_size": int(fact("feed_forward_length")),
        "num_hidden_layers": int(fact("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta.get(f"{prefix}.attention.head_count_kv", heads)),
        "max_position_embeddings": int(fact("context_length")),
        "rms_norm_eps": float(np.float32(fact("attention.layer_norm_rms_epsilon"))),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }


def _head_dim(meta: Mapping[str, Any], prefix: str, config: Mapping[str, Any]) -> int:
    stated = meta.get(f"{prefix}.attention.key_length") or meta.get(f"{prefix}.rope.dimension_count")
    return int(stated or config["hidden_size"] // config["num_attention_heads"])


def _rope_parameters(file: GgufFile, prefix: str) -> dict[str, Any] | None:
    meta = file.metadata
    theta = float(meta.get(f"{prefix}.rope.freq_base", 10000.0))
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, prefix, theta)
    kind = meta.get(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": float(meta[f"{prefix}.rope.scaling.factor"])}
    return None


def _llama3_rope(file: GgufFile, prefix: str, theta: float) -> dict[str, Any]:
    """Llama 3.1's rotary scaling, which GGUF keeps only as the factors that come out of it."""
    found = file.read(file.tensors["rope_freqs.weight"])
    factor, low, high, original = float(found.max()), 1.0, 4.0, 8192
    lengths = 2 * np.pi * theta ** (np.arange(len(found)) / len(found))
    smooth = (original / lengths - low) / (high - low)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(lengths < original / high, 1.0, np.where(lengths > original / low, factor, expected))
    if not np.allclose(found, expected, rtol=1e-3):
        raise ModelError(
            f"{file.path}: its rotary factors (rope_freqs) are not those of Llama 3 with factor {factor:g} over "
            f"{original} tokens, the only kind mxn knows; available: safetensors of the same model"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _restore_llama(name: str, weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """llama.cpp interleaves the two halves of each query and key head."""
    if ".attn_q." in name or ".attn_k." in name:
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight


def _restore_gemma3(name: str, weight: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """llama.cpp stores norms as weight + 1, and may pad the vocabulary."""
    if name.endswith("norm.weight"):
        return weight - 1
    return weight[: config["vocab_size"]] if name == "token_embd.weight" else weight


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        config=_llama_config, layer_names={"ffn_norm": "post_attention_layernorm"}, restore=_restore_llama
    ),
    "gemma3": Architecture(
        config=_gemma3_config,
        layer_names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        restore=_restore_gemma3,
    ),
}
