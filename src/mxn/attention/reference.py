"""Paged attention in plain torch: the oracle for every kernel, and the path where nothing can be compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from mxn.attention.base import AttentionBackend, AttentionMetadata, LayerKV


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    """One sequence with more than one new token."""

    start: int
    length: int
    context: int
    blocks: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Index tensors of one step, shared by all layers.

    rows, blocks, contexts: flat index, block table and context length of each sequence with one new token.
    written, slots: flat indices of the tokens that are stored, and where; written is None when all are.
    """

    meta: AttentionMetadata
    written: torch.Tensor | None
    slots: torch.Tensor
    rows: torch.Tensor
    blocks: torch.Tensor
    contexts: torch.Tensor
    prompts: tuple[_Prompt, ...]


class ReferenceAttention(AttentionBackend):
    """Gathers each sequence's blocks and calls SDPA; softcap and sinks are written out.

    Any device and any float dtype; the KV cache has the dtype and device it is made with. Sequences that decode one
    token are padded into one batch, the others run one by one.
    """

    name: ClassVar[str] = "reference"

    def __init__(
        self,
        layers: Sequence[LayerKV],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(layers, num_blocks, block_size)

        def empty(kv_heads: int, dim: int) -> torch.Tensor:
            return torch.zeros(num_blocks, block_size, kv_heads, dim, dtype=dtype, device=device)

        self.keys = [empty(layer.num_kv_heads, layer.key_dim) for layer in self.layers]
        self.values = [empty(layer.num_kv_heads, layer.value_dim) for layer in self.layers]
        self._plan: _Plan | None = None

    @classmethod
    def bytes_per_block(
        cls, layers: Sequence[LayerKV], block_size: int, *, dtype: torch.dtype = torch.float32, device: object = None
    ) -> int:
        per_token = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
        return per_token * block_size * dtype.itemsize

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        meta: AttentionMetadata,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._check_shapes(layer, query, key, value, meta)
        plan = self._plan_of(meta)
        keys, values = self.keys[layer], self.values[layer]
        _store(keys, key, plan)
        _store(values, value, plan)

        num_heads, num_tokens, _ = query.shape
        out = query.new_empty(num_tokens, num_heads, value.shape[2])
        if plan.rows.numel():
            out[plan.rows] = _attend_decodes(query, keys, values, plan, scaling, window, softcap, sinks)
        for prompt in plan.prompts:
            tokens = slice(prompt.start, prompt.start + prompt.length)
            out[tokens] = _attend_prompt(query[:, tokens], keys, values, prompt, scaling, window, softcap, sinks)
        return out

    def copy_blocks(self, moves: Sequence[tuple[int, int]]) -> None:
        for cache in (*self.keys, *self.values):
            for source, destination in moves:
                cache[destination] = cache[source]

    def _plan_of(self, meta: AttentionMetadata) -> _Plan:
        if self._plan is None or self._plan.meta is not meta:
            self._plan = _make_plan(meta, self.keys[0].device)
        return self._plan

    def _check_shapes(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, meta: AttentionMetadata
    ) -> None:
        spec, num_tokens = self.layers[layer], meta.num_tokens
        for name, tensor, heads, dim in (
            ("query", query, query.shape[0], spec.key_dim),
            ("key", key, spec.num_kv_heads, spec.key_dim),
            ("value", value, spec.num_kv_heads, spec.value_dim),
        ):
            if tuple(tensor.shape) != (heads, num_tokens, dim):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {(heads, num_tokens, dim)}")
        if query.shape[0] % spec.num_kv_heads:
            raise ValueError(f"query has {query.shape[0]} heads, expected a multiple of {spec.num_kv_heads}")


def _make_plan(meta: AttentionMetadata, device: torch.device) -> _Plan:
    starts, contexts = meta.query_starts.tolist(), meta.context_lens.tolist()
    table, slots = meta.block_table.to(device, torch.long), meta.slot_mapping.to(device, torch.long)
    lengths = [end - start for start, end in pairwise(starts)]
    decodes = [index for index, length in enumerate(lengths) if length == 1]
    written = None if bool((slots >= 0).all()) else (slots >= 0).nonzero().flatten()
    return _Plan(
        meta=meta,
        written=written,
        slots=slots if written is None else slots[written],
        rows=torch.tensor([starts[index] for index in decodes], dtype=torch.long, device=device),
        blocks=table[decodes],
        contexts=torch.tensor([contexts[index] for index in decodes], dtype=torch.long, device=device),
        prompts=tuple(
            _Prompt(start=starts[index], length=length, context=contexts[index], blocks=table[index])
            for index, length in enumerate(lengths)
            if length > 1
        ),
    )


def _store(cache: torch.Tensor, new: torch.Tensor, plan: _Plan) -> None:
    """Writes (heads, tokens, dim) into the cache's token slots."""
    tokens = new.transpose(0, 1)
    if plan.written is not None:
        tokens = tokens[plan.written]
    cache.view(-1, *cache.shape[2:])[plan.slots] = tokens.to(cache.dtype)


def _attend_decodes(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: _Plan,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of sequences with one new token each, padded to the longest. Returns (sequences, heads, value dim)."""
    block_size, num_kv_heads = keys.shape[1], keys.shape[2]
    longest = int(plan.contexts.max())
    blocks = plan.blocks[:, : -(-longest // block_size)]
    # (sequences, KV heads, context, dim)
    gathered_keys = keys[blocks].flatten(1, 2)[:, :longest].transpose(1, 2).to(query.dtype)
    gathered_values = values[blocks].flatten(1, 2)[:, :longest].transpose(1, 2).to(query.dtype)
    # The heads of a group are the rows of one small matrix product: (sequences, KV heads, group, dim).
    grouped = query[:, plan.rows].transpose(0, 1).unflatten(1, (num_kv_heads, -1))

    positions = torch.arange(longest, device=query.device)
    visible = positions < plan.contexts[:, None]
    if window is not None:
        visible &= positions >= plan.contexts[:, None] - window
    mask = visible[:, None, None, :]
    sink_logits = None if sinks is None else sinks.view(1, num_kv_heads, -1, 1)
    out = _attend(grouped, gathered_keys, gathered_values, mask, scaling, softcap, sink_logits)
    return out.flatten(1, 2)


def _attend_prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prompt: _Prompt,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of one sequence's new tokens over its whole context. Returns (tokens, heads, value dim)."""
    block_size, num_kv_heads = keys.shape[1], keys.shape[2]
    blocks = prompt.blocks[: -(-prompt.context // block_size)]
    gathered_keys = keys[blocks].flatten(0, 1)[: prompt.context].transpose(0, 1).to(query.dtype)
    gathered_values = values[blocks].flatten(0, 1)[: prompt.context].transpose(0, 1).to(query.dtype)
    first = prompt.context - prompt.length
    is_whole = first == 0 and (window is None or window >= prompt.context)
    if is_whole and softcap is None and sinks is None:
        out = scaled_dot_product_attention(
            query[None], gathered_keys[None], gathered_values[None], is_causal=True, scale=scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    key_positions = torch.arange(prompt.context, device=query.device)
    query_positions = torch.arange(first, prompt.context, device=query.device)[:, None]
    mask = key_positions <= query_positions
    if window is not None:
        mask &= key_positions > query_positions - window
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(
            query[None], gathered_keys[None], gathered_values[None], attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    grouped = query.unflatten(0, (num_kv_heads, -1))
    sink_logits = None if sinks is None else sinks.view(num_kv_heads, -1, 1, 1)
    out = _attend(grouped, gathered_keys[:, None], gathered_values[:, None], mask, scaling, softcap, sink_logits)
    return out.flatten(0, 1).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over (..., rows, dim) with a boolean mask; written out where SDPA lacks softcap and sinks."""
    if softcap is None and sink_logits is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    scores = (query @ keys.transpose(-1, -2) * scaling).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sink_logits is None:
        return scores.softmax(-1).to(values.dtype) @ values
    sink_column = sink_logits.float().expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink_column], dim=-1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values
