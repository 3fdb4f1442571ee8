"""Tiny random decoder models in Hugging Face layout, written without torch: what L1 to L3 run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mxn.core.model import Model
from mxn.store.spec import spec_from_config

Weights = dict[str, npt.NDArray[np.float32]]

_SPECIAL = ("<s>", "</s>")
_USUAL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": False}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def write_tiny_model(architecture: str, folder: Path, *, seed: int = 0) -> Model:
    """Writes a random model of one of `ARCHITECTURES` and returns it, ready to be loaded.

    The weights are scaled so that attention is sharp and the likeliest token is clearly ahead of the next: a wrong
    block or a missed position then changes tokens.
    """
    name, changes = _ARCHITECTURES[architecture]
    config = {"model_type": architecture, "architectures": [name], **_USUAL, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    _write_tokenizer(folder)
    _write_safetensors(folder / "model.safetensors", _random_weights(config, seed))
    return Model(
        name=f"tiny-{architecture}", folder=str(folder), revision=f"seed-{seed}", spec=spec_from_config(config)
    )


def read_safetensors(path: Path) -> Weights:
    """All tensors of a file as float32. Types other than F32, F16 and BF16 are not read."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header: Mapping[str, Any] = json.loads(raw[8 : 8 + size])
    found: Weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in ("F32", "F16"):
            values = np.frombuffer(data, np.float32 if entry["dtype"] == "F32" else np.float16).astype(np.float32)
        else:
            continue
        found[name] = values.reshape(entry["shape"])
    return found


def _write_safetensors(path: Path, weights: Weights) -> None:
    header, end = {}, 0
    for name, weight in weights.items():
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [end, end + weight.nbytes]}
        end += weight.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(weight.tobytes())


def _random_weights(config: Mapping[str, Any], seed: int) -> Weights:
    random = np.random.default_rng(seed)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim, kv = config["head_dim"], config["num_key_value_heads"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> npt.NDArray[np.float32]:
        return random.standard_normal((rows, columns), np.float32) * np.float32(gain / columns**0.5)

    def norm(size: int) -> npt.NDArray[np.float32]:
        return 1 + random.standard_normal(size, np.float32) * np.float32(0.1)

    weights: Weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden, 4.0)}
    for layer in range(config["num_hidden_layers"]):
        at, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for name, size, gain in (("q", heads * head_dim, 1.6), ("k", kv * head_dim, 1.6), ("v", kv * head_dim, 1.0)):
            weights[f"{at}{name}_proj.weight"] = matrix(size, hidden, gain)
            if config["model_type"] == "qwen2":
                weights[f"{at}{name}_proj.bias"] = matrix(1, size, 4.0)[0]
        if config["model_type"] == "qwen3":
            weights[f"{at}q_norm.weight"], weights[f"{at}k_norm.weight"] = norm(head_dim), norm(head_dim)
        weights[f"{at}o_proj.weight"] = matrix(hidden, heads * head_dim)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            weights[f"{mlp}{name}_proj.weight"] = matrix(rows, columns)
        for name in ("input", "post_attention"):
            weights[f"model.layers.{layer}.{name}_layernorm.weight"] = norm(hidden)
    weights["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, 4.0)
    return weights


def _write_tokenizer(folder: Path) -> None:
    """One token for each byte and two control tokens; the other ids of the vocabulary have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={ch: i for i, ch in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    start, end = _SPECIAL
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
