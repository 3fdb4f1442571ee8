"""FlashAttention-3 for `ragged_prefill`, where its package is installed: NVIDIA's Hopper only, by name only.

Written after the package's documented interface; it has not been run yet. Who uses it compares it with a reference
first, as mxn does when it loads a model. Source: Shah et al., FlashAttention-3 (2024).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.checks import need
from mxn_kernels.target import Target

_MODULE = "flash_attn_interface"
_MAX_DIM = 256


def why_not_flash_attention(target: Target, caches: Sequence[KVCache]) -> str | None:
    """Why it cannot serve these caches on this chip, or None."""
    if target.name != "sm_90":
        return f"it runs on sm_90, this is {target.name}"
    if importlib.util.find_spec(_MODULE) is None:
        return f"the Python module {_MODULE} is not installed"
    for cache in caches:
        if cache.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes caches of float16 and bfloat16, found {cache.dtype}"
        if cache.key_dim != cache.value_dim or cache.key_dim > _MAX_DIM:
            return f"it takes equal head sizes up to {_MAX_DIM}, found {cache.key_dim} and {cache.value_dim}"
    return None


def ragged_prefill(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    target: Target,
) -> None:
    """Fills out (T, num_heads, value_dim) and, if given, lse (T, num_heads). Sinks are refused."""
    need(sinks is None, "flash-attention-3 has no sinks here; use the Triton implementation")
    from flash_attn_interface import flash_attn_with_kvcache

    found = flash_attn_with_kvcache(
        query,
        cache.keys.transpose(1, 2),
        cache.values.transpose(1, 2),
        cache_seqlens=context_lens,
        page_table=block_table,
        cu_seqlens_q=query_starts,
        max_seqlen_q=query.shape[0],
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        return_softmax_lse=lse is not None,
    )
    if lse is None:
        out.copy_(found)
    else:
        out.copy_(found[0])
        lse.copy_(found[1].transpose(0, 1))
