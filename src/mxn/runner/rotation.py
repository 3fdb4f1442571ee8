"""Rotary embeddings that change with the longest position in a batch are fixed at load time, or refused.

transformers picks their frequencies by `max(position_ids)`. On a flat batch that would make one sequence's rotation
depend on its neighbours, and keys already in the cache would no longer match.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mxn.errors import UnsupportedModelError

_LENGTH_DEPENDENT = ("longrope", "dynamic")


def fixed_context(config: PreTrainedConfig, wanted: int | None, limit: int) -> tuple[int, str | None]:
    """The longest context that one set of rotations serves, and a note when that is less than the model's limit.

    Raises: UnsupportedModelError when `wanted` needs rotations that change with length.
    """
    rope = _rope_parameters(config)
    kind = rope.get("rope_type")
    if kind not in _LENGTH_DEPENDENT:
        return min(wanted or limit, limit), None
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = int(original or config.max_position_embeddings)
    if wanted is None:
        note = f"context held at {original} of {limit} tokens: {kind} rotary embeddings change beyond it"
        return min(original, limit), note if original < limit else None
    if wanted <= original:
        return wanted, None
    if kind == "longrope":
        return min(
            wanted, limit
        ), f"long rotary factors serve all lengths, short ones too, for {wanted} tokens of context"
    raise UnsupportedModelError(
        f"a context of {wanted} tokens needs dynamic rotary embeddings, which change as a sequence grows; "
        f"available: up to {original} tokens"
    )


def fix_rotation(model: torch.nn.Module, config: PreTrainedConfig, max_context: int) -> None:
    """Makes length-dependent rotary modules constant for contexts up to `max_context` (see `fixed_context`)."""
    rope = _rope_parameters(config)
    if rope.get("rope_type") not in _LENGTH_DEPENDENT:
        return
    original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    for module in model.modules():
        if getattr(module, "rope_type", None) not in _LENGTH_DEPENDENT:
            continue
        if module.rope_type == "longrope" and max_context > original:
            long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, module.inv_freq.device, seq_len=original + 1)
            module.inv_freq.copy_(long)
        module.rope_type = "default"


def _rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    return next((part for part in nested if part.get("rope_type") in _LENGTH_DEPENDENT), rope if not nested else {})
