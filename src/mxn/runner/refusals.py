"""Which architectures would be served wrongly, told from the config alone. No torch, so a plan can say it early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxn.store.spec import FULL_LAYER_TYPES, WINDOW_LAYER_TYPES, text_config

_RECURRENT = (
    "its recurrent layers would carry state from one sequence into the next, because a step is one flat batch of all "
    "sequences"
)
_OWN_ATTENTION = "its layers compute attention themselves and never call transformers' attention interface"
_ENCODER = "it is not a decoder that writes one token after another"
_SHARED_KV = "its last layers read the keys and values of earlier ones from transformers' own cache"

_BY_ARCHITECTURE: dict[str, str] = {"gemma3n_text": _SHARED_KV}
for _reason, _architectures in (
    (_RECURRENT, "mamba mamba2 falcon_mamba rwkv xlstm recurrent_gemma jamba bamba falcon_h1 zamba zamba2 nemotron_h"),
    (_RECURRENT, "minimax qwen3_next qwen3_5_text qwen3_5_moe_text kimi_linear olmo_hybrid granitemoehybrid lfm2"),
    (_RECURRENT, "lfm2_moe lfm3"),
    (_OWN_ATTENTION, "bloom falcon gpt_neo gpt_neox_japanese mpt openai-gpt xglm xlnet codegen ctrl stablelm"),
    (_ENCODER, "bert roberta distilbert electra deberta deberta-v2 mpnet xlm-roberta modernbert albert"),
    (_ENCODER, "bart t5 pegasus marian mbart"),
):
    _BY_ARCHITECTURE |= dict.fromkeys(_architectures.split(), _reason)


def refusal_by_architecture(architecture: str) -> str | None:
    """Why models of this `model_type` cannot be served on a flat batch, or None when nothing speaks against it."""
    return _BY_ARCHITECTURE.get(architecture)


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json cannot be served on a flat batch, or None. The self-test has the last word."""
    text = text_config(config)
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        return _ENCODER
    layer_types = set(text.get("layer_types") or ()) - WINDOW_LAYER_TYPES - FULL_LAYER_TYPES
    if "chunked_attention" in layer_types:
        return (
            "its layers attend within chunks, which transformers expresses only as a mask that a paged cache never sees"
        )
    if layer_types:
        return f"it has layers of kind {', '.join(sorted(layer_types))}, expected full or sliding attention only"
    if text.get("num_kv_shared_layers"):
        return _SHARED_KV
    return refusal_by_architecture(str(text.get("model_type", "")))
