"""Reads a model's architecture facts out of its config.json, without torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxn.core.model import ModelSpec
from mxn.errors import ModelError

Config = Mapping[str, Any]

WINDOW_LAYER_TYPES = frozenset({"sliding_attention"})
FULL_LAYER_TYPES = frozenset({"full_attention"})

# Other names for the same fact, in the order they are tried.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "max_context": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    "mlp_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_size": ("moe_intermediate_size", "intermediate_size"),
}

# What transformers' config classes assume when the file is silent.
_HEAD_DIM = {
    "gemma": 256,
    "gemma2": 256,
    "gemma3_text": 256,
    "qwen3": 128,
    "gpt_oss": 64,
    "cohere2": 128,
    "glm4": 128,
    "ernie4_5": 128,
    "seed_oss": 128,
    "llama4_text": 128,
}
_WINDOW = {"mistral": 4096, "ministral": 4096, "gemma2": 4096, "gemma3_text": 4096, "cohere2": 4096, "gpt_oss": 128}
_TIED_EMBEDDINGS = {"gemma", "gemma2", "gemma3_text", "gpt2", "opt", "starcoder2", "cohere", "cohere2", "smollm3"}
_TIED_EMBEDDINGS |= {"ernie4_5", "bloom", "falcon", "minicpm3"}
_ENCODERS = {"bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "electra", "camembert"}
_TIED_EMBEDDINGS |= _ENCODERS
# One sliding layer after another with a full one at every n-th place; 1 means that every layer slides.
_SLIDING_PERIOD = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "cohere2": 4, "exaone4": 4, "olmo3": 4}
_TWO_MATRIX_MLP = {"gpt2", "gptj", "gpt_neox", "gpt_bigcode", "opt", "bloom", "falcon", "phi", "starcoder2", "nemotron"}
_TWO_MATRIX_MLP |= _ENCODERS
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}


def spec_from_config(config: Config) -> ModelSpec:
    """Architecture facts of a Hugging Face config.json.

    Raises: ModelError that names the missing key; the file's other names for it are tried first.
    """
    text = text_config(config)
    num_heads = _count(text, "num_heads")
    key_dim, value_dim = _head_dims(text, num_heads)
    is_latent = _is_latent_attention(text)
    num_parameters, num_active = _count_parameters(text)
    return ModelSpec(
        architecture=str(text.get("model_type", "unknown")),
        num_layers=_count(text, "num_layers"),
        hidden_size=_count(text, "hidden_size"),
        vocab_size=_count(text, "vocab_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads if is_latent else _kv_heads(text, num_heads),
        key_dim=key_dim,
        value_dim=value_dim,
        max_context=_max_context(text),
        num_parameters=num_parameters,
        num_active_parameters=num_active,
        layer_windows=layer_windows(text),
    )


def text_config(config: Config) -> Config:
    """The part of a config that describes the language model; the whole of it for a text-only model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def layer_windows(config: Config) -> tuple[int | None, ...]:
    """Per layer, tokens a query sees including itself, or None for full attention."""
    text = text_config(config)
    num_layers = _count(text, "num_layers")
    architecture = str(text.get("model_type", ""))
    window = text.get("sliding_window", _WINDOW.get(architecture))
    if not window or text.get("use_sliding_window") is False or _is_window_off_by_default(text, architecture):
        return (None,) * num_layers
    layer_types = text.get("layer_types")
    if layer_types is not None:
        return tuple(int(window) if kind in WINDOW_LAYER_TYPES else None for kind in layer_types)
    if architecture in ("qwen2", "qwen3", "qwen2_moe"):
        first = int(text.get("max_window_layers", 28))
        return tuple(int(window) if layer >= first else None for layer in range(num_layers))
    period = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 0)
    period = period or _SLIDING_PERIOD.get(architecture, 0)
    return tuple(None if period > 1 and (layer + 1) % period == 0 else int(window) for layer in range(num_layers))


def _max_context(text: Config) -> int:
    """Tokens of a sequence. RoBERTa's kind numbers positions from after the padding token's id."""
    limit = _count(text, "max_context")
    if text.get("model_type") in _POSITIONS_AFTER_PADDING:
        return limit - int(text.get("pad_token_id", 1)) - 1
    return limit


def _is_window_off_by_default(text: Config, architecture: str) -> bool:
    return architecture.startswith(("qwen2", "qwen3", "smollm3")) and not text.get("use_sliding_window", False)


def _is_latent_attention(text: Config) -> bool:
    return text.get("kv_lora_rank") is not None and text.get("qk_nope_head_dim") is not None


def _head_dims(text: Config, num_heads: int) -> tuple[int, int]:
    if _is_latent_attention(text):
        return int(text["qk_nope_head_dim"]) + int(text["qk_rope_head_dim"]), int(text["v_head_dim"])
    head_dim = text.get("head_dim") or _HEAD_DIM.get(str(text.get("model_type")))
    head_dim = int(head_dim) if head_dim else _count(text, "hidden_size") // num_heads
    return head_dim, head_dim


def _kv_heads(text: Config, num_heads: int) -> int:
    if text.get("multi_query"):
        return 1
    found = _find(text, "num_kv_heads")
    return int(found) if found else num_heads


def _count_parameters(text: Config) -> tuple[int | None, int | None]:
    """Weights of a usual decoder or encoder: all, and those one token uses. Biases and norms are left out."""
    mlp_size = _find(text, "mlp_size")
    if mlp_size is None and text.get("model_type") not in ("gpt2", "gptj", "bloom", "falcon"):
        return None, None
    hidden, num_layers, vocab = (_count(text, name) for name in ("hidden_size", "num_layers", "vocab_size"))
    mlp_size = int(mlp_size or 4 * hidden)
    num_matrices = 2 if text.get("model_type") in _TWO_MATRIX_MLP else 3
    dense_mlp = num_matrices * hidden * mlp_size
    is_tied = bool(text.get("tie_word_embeddings", text.get("model_type") in _TIED_EMBEDDINGS))
    embedding = vocab * hidden
    if text.get("model_type") in ("gpt2", "opt"):
        embedding += _count(text, "max_context") * hidden
    shared = num_layers * _attention_parameters(text, hidden) + embedding + (0 if is_tied else vocab * hidden)

    num_experts = int(_find(text, "num_experts") or 0)
    if not num_experts:
        return shared + num_layers * dense_mlp, None
    sparse = [layer for layer in range(num_layers) if _is_sparse_layer(text, layer)]
    expert = num_matrices * hidden * int(_find(text, "expert_size") or mlp_size)
    always = (num_layers - len(sparse)) * dense_mlp
    always += len(sparse) * (hidden * num_experts + _shared_expert_parameters(text, hidden, expert))
    num_used = int(text.get("num_experts_per_tok") or text.get("num_selected_experts") or 1)
    total = shared + always + len(sparse) * num_experts * expert
    return total, shared + always + len(sparse) * num_used * expert


def _attention_parameters(text: Config, hidden: int) -> int:
    num_heads = _count(text, "num_heads")
    key_dim, value_dim = _head_dims(text, num_heads)
    output = num_heads * value_dim * hidden
    if _is_latent_attention(text):
        kv_rank, query_rank = int(text["kv_lora_rank"]), text.get("q_lora_rank")
        query = query_rank * (hidden + num_heads * key_dim) if query_rank else hidden * num_heads * key_dim
        up = kv_rank * num_heads * (int(text["qk_nope_head_dim"]) + value_dim)
        return int(query + hidden * (kv_rank + int(text["qk_rope_head_dim"])) + up + output)
    return hidden * (num_heads * key_dim + _kv_heads(text, num_heads) * (key_dim + value_dim)) + output


def _is_sparse_layer(text: Config, layer: int) -> bool:
    if layer < int(text.get("first_k_dense_replace") or 0) or layer in (text.get("mlp_only_layers") or ()):
        return False
    kinds = text.get("mlp_layer_types")
    if kinds:
        return bool(kinds[layer] == "sparse")
    return (layer + 1) % int(text.get("decoder_sparse_step") or 1) == 0


def _shared_expert_parameters(text: Config, hidden: int, expert: int) -> int:
    if text.get("shared_expert_intermediate_size"):
        return 3 * hidden * int(text["shared_expert_intermediate_size"])
    return int(text.get("n_shared_experts") or 0) * expert


def _find(text: Config, fact: str) -> Any:
    return next((text[name] for name in _NAMES.get(fact, (fact,)) if text.get(name) is not None), None)


def _count(text: Config, fact: str) -> int:
    found = _find(text, fact)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        names = " or ".join(_NAMES.get(fact, (fact,)))
        kind = text.get("model_type", "no model_type")
        raise ModelError(f"config.json ({kind}): expected {names} as a positive whole number, found {found!r}")
    return found
