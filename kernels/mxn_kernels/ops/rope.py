"""Rotary position embedding of queries and keys, which may go straight into the paged cache."""

from __future__ import annotations

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.checks import check_rows, need, target_of
from mxn_kernels.ops.write_kv import check_new_rows, write_kv_reference
from mxn_kernels.select import select
from mxn_kernels.target import Target


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_interleaved: bool = False,
    value: torch.Tensor | None = None,
    cache: KVCache | None = None,
    slot_mapping: torch.Tensor | None = None,
    check_ids: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rotates pairs of each head's first dimensions by each token's angles; further dimensions pass through.

    Args:
      query (T, num_heads, key_dim), key (T, num_kv_heads, key_dim): any strides but a contiguous last dimension.
      cos, sin (T, rotary_dim // 2): of each pair. is_interleaved: pairs are neighbours (GPT-J), not halves (Llama).
      value, cache, slot_mapping: all or none, as in `write_kv`. Given, rotated keys and values are written to the
      cache, and
        rotated keys nowhere else: one pass over them is saved.
    Returns: rotated query, and rotated key where there is no cache; contiguous, in their dtype.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    check_rows("query", query, (None, None, None))
    num_tokens, _, dim = query.shape
    check_rows("key", key, (num_tokens, None, dim), (query.dtype,))
    check_rows("cos", cos, (num_tokens, None))
    check_rows("sin", sin, tuple(cos.shape), (cos.dtype,))
    half = cos.shape[1]
    need(0 < 2 * half <= dim, f"cos and sin rotate {2 * half} dimensions of a head, which has {dim}")
    given = [part is not None for part in (value, cache, slot_mapping)]
    need(all(given) or not any(given), "value, cache and slot_mapping come together")
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        need(tensor.device == query.device, f"{name} is on {tensor.device}, query on {query.device}")
    out_key = None
    if cache is None:
        target = target_of(query, target, query.dtype)
        out_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    else:
        check_new_rows(key, value, cache, slot_mapping, check_ids)
        target = target_of(query, target, query.dtype, cache.dtype)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    select("rope", target, implementation)(
        query,
        key,
        cos,
        sin,
        is_interleaved=is_interleaved,
        value=value,
        cache=cache,
        slot_mapping=slot_mapping,
        out=out,
        out_key=out_key,
        target=target,
    )
    return out if out_key is None else (out, out_key)


def rope_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_interleaved: bool = False,
    value: torch.Tensor | None = None,
    cache: KVCache | None = None,
    slot_mapping: torch.Tensor | None = None,
    out: torch.Tensor,
    out_key: torch.Tensor | None = None,
    target: Target | None = None,
) -> None:
    """The same in torch, in float64."""
    out.copy_(_rotate(query, cos, sin, is_interleaved))
    rotated = _rotate(key, cos, sin, is_interleaved)
    if cache is None:
        out_key.copy_(rotated)
    else:
        write_kv_reference(rotated.to(key.dtype), value, cache, slot_mapping)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    half = cos.shape[1]
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    rotated = x.clone()
    pairs = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if is_interleaved else (slice(0, half), slice(half, 2 * half))
    )
    first, second = x[..., pairs[0]], x[..., pairs[1]]
    rotated[..., pairs[0]] = first * cos - second * sin
    rotated[..., pairs[1]] = second * cos + first * sin
    return rotated
