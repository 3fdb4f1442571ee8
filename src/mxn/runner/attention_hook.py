"""The one attention function that transformers' decoder models call, and what travels to it through their kwargs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mxn.attention.base import AttentionBackend, AttentionMetadata, LayerKV
from mxn.errors import UnsupportedModelError

ATTENTION_NAME = "mxn"


@dataclass(slots=True)
class AttentionCall:
    """One forward pass: which attention backend serves it and where its tokens live.

    windows: per layer, derived from the config, because a model may express its windows only by masks, and an
      attention name that transformers does not know gets no mask.
    num_calls: attention layers that ran so far.
    """

    backend: AttentionBackend
    meta: AttentionMetadata
    windows: Sequence[int | None]
    num_calls: int = 0


@dataclass(slots=True)
class LayerRecorder:
    """Stands in for an attention call to learn each layer's shapes; its layers answer zeros."""

    windows: Sequence[int | None]
    layers: dict[int, LayerKV] = field(default_factory=dict)


def register() -> None:
    """Makes the function known to transformers under `ATTENTION_NAME`. Safe to call again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attend)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    mxn: AttentionCall | LayerRecorder | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, heads, T, dim), key and value (1, KV heads, T, dim), rotated.

    Returns (1, T, heads, value dim) and no weights.
    """
    if mxn is None:
        raise UnsupportedModelError(f"{type(module).__name__} does not hand the model's arguments on to its attention")
    layer = module.layer_idx
    window = mxn.windows[layer]
    if sliding_window is not None and sliding_window != window:
        raise UnsupportedModelError(
            f"attention layer {layer} asks for a window of {sliding_window} tokens, expected {window} from the config"
        )
    if type(mxn) is LayerRecorder:
        mxn.layers[layer] = LayerKV(
            num_kv_heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3], window=window
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    mxn.num_calls += 1
    out = mxn.backend.forward(
        layer,
        query[0],
        key[0],
        value[0],
        mxn.meta,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def discover_layers(model: torch.nn.Module, windows: Sequence[int | None]) -> tuple[LayerKV, ...]:
    """Each attention layer's KV shape, seen by running one token through the loaded model.

    Raises: UnsupportedModelError when a layer never reaches the attention interface.
    """
    recorder = LayerRecorder(windows)
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.inference_mode():
        model(input_ids=ids, position_ids=ids.clone(), use_cache=False, mxn=recorder)
    missing = [layer for layer in range(len(windows)) if layer not in recorder.layers]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(recorder.layers)} of {len(windows)} layers reach transformers' attention "
            f"interface, expected all; layer {missing[0]} does not"
        )
    return tuple(recorder.layers[layer] for layer in range(len(windows)))
