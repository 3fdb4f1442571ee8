"""Attention over tokens that lie in order: what the references of the paged ops share."""

from __future__ import annotations

import torch


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Args: query (Q, num_heads, K); keys (L, num_kv_heads, K) and values, in the dtype to compute in; visible (Q, L)
    bool.

    Returns: attention (Q, num_heads, V) and natural log-sum-exp (Q, num_heads), sinks included. Zeros and -inf where a
    row sees nothing.
    """
    group = query.shape[1] // keys.shape[1]
    dtype = keys.dtype
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = torch.einsum("qhd,lhd->hql", query.to(dtype), keys) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, query.shape[0], 1)], -1)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:2], float("-inf"))
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])[..., : keys.shape[0]]
    return torch.einsum("hql,lhv->qhv", weights, values), lse.T
