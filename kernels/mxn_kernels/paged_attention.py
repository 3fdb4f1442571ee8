"""Attention over a paged KV cache: writes a step's keys and values, then attends causally.

Contexts are cut and added up by their own length alone, never by what else is in the batch or by the number of threads.
"""

from __future__ import annotations

import ctypes

import torch

from mxn_kernels.cpu.library import Workspace
from mxn_kernels.cpu_cache import LayerCache


class _Batch(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("query_starts", "context_lens", "block_table", "slot_mapping")],
        *[(name, ctypes.c_int32) for name in ("num_tokens", "num_seqs", "max_blocks")],
    ]


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("head_stride", ctypes.c_int64), ("token_stride", ctypes.c_int64)]


class _Operands(ctypes.Structure):
    _fields_ = [
        ("query", _Rows),
        ("key", _Rows),
        ("value", _Rows),
        ("out", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("num_heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Fault(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "index", "found", "limit")]


FAULTS = {
    1: "query_starts[{index}] is {found}; it must start at 0, not fall, and end at the number of tokens ({limit})",
    2: "context_lens[{index}] is {found}; it must be at least the query length and at most {limit}",
    3: "block_table row {index} names block {found}; blocks are 0 to {limit} (exclusive)",
    4: "slot_mapping[{index}] is {found}; slots are -1 (not written) or 0 to {limit} (exclusive)",
    6: "token_ids[{index}] is {found}; tokens are 0 to {limit} (exclusive)",
    7: "positions[{index}] is {found}; positions are 0 to {limit} (exclusive)",
    8: "logit_rows[{index}] is {found}; rows are 0 to {limit} (exclusive)",
}


class PagedBatch:
    """A step's batch, checked and laid out once for all layers. Holds the tensors, which must not change meanwhile.

    Args, int32 and contiguous: query_starts (S + 1), context_lens (S), block_table (S, max_blocks), slot_mapping (T).
    Raises: ValueError naming the tensor that does not fit.
    """

    def __init__(
        self,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        num_seqs = context_lens.shape[0]
        shapes = {
            "query_starts": (query_starts, (num_seqs + 1,)),
            "context_lens": (context_lens, (num_seqs,)),
            "block_table": (block_table, (num_seqs, block_table.shape[-1])),
            "slot_mapping": (slot_mapping, (slot_mapping.shape[0],)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor.dtype is not torch.int32 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"{name} must be contiguous int32 {shape}, found {found}")
        self.tensors = (query_starts, context_lens, block_table, slot_mapping)
        self.num_tokens = slot_mapping.shape[0]
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        self._struct = _Batch(*pointers, self.num_tokens, num_seqs, block_table.shape[1])
        self.address = ctypes.addressof(self._struct)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    batch: PagedBatch,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    workspace: Workspace,
) -> torch.Tensor:
    """Writes keys and values at the batch's slots, then attends.

    Args: query (num_heads, T, key_dim), key (num_kv_heads, T, key_dim), value (num_kv_heads, T, value_dim): float32,
      last dimension contiguous, other strides free. window: tokens a query sees including itself.
      sinks (num_heads,) float32: raw logits added to each softmax's denominator.
    Returns: (T, num_heads, value_dim) float32, contiguous. A row depends on its own sequence alone, bit for bit.
    Raises: ValueError on shapes, types, or any index outside the cache; nothing is written then.
    """
    num_heads, num_tokens, _ = query.shape
    _check(query, key, value, cache, batch, window, softcap, sinks)
    out = torch.empty((num_tokens, num_heads, cache.value_dim))
    operands = _Operands(
        _rows(query),
        _rows(key),
        _rows(value),
        out.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        num_heads,
        window or 0,
        scaling,
        softcap or 0.0,
    )
    fault = Fault()
    kind = workspace.library.paged_attention(
        workspace.handle,
        workspace.plan,
        cache.address,
        batch.address,
        ctypes.addressof(operands),
        ctypes.addressof(fault),
    )
    if kind:
        if kind not in FAULTS:
            raise MemoryError(f"no memory for attention over {num_tokens} tokens")
        raise ValueError(FAULTS[kind].format(index=fault.index, found=fault.found, limit=fault.limit))
    return out


def paged_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    batch: PagedBatch,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """The same in torch, one sequence at a time, in float64 over what the cache holds."""
    starts, contexts, table, slots = batch.tensors
    size = cache.block_size
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache.put(slot, key[:, token], value[:, token])
    out = torch.empty((query.shape[1], query.shape[0], cache.value_dim))
    group = query.shape[0] // cache.num_kv_heads
    for seq, context in enumerate(contexts.tolist()):
        first, last = int(starts[seq]), int(starts[seq + 1])
        if first == last:
            continue
        keys, values = cache.gather(table[seq, : -(-context // size)], context)
        keys, values = (t.double().repeat_interleave(group, 0) for t in (keys, values))
        scores = query[:, first:last].double() @ keys.transpose(1, 2) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        position = torch.arange(context - (last - first), context)[:, None]
        seen = torch.arange(context) <= position
        if window:
            seen &= torch.arange(context) > position - window
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(-1, last - first, 1)
            weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
        else:
            weights = torch.softmax(scores, -1)
        out[first:last] = (weights @ values).transpose(0, 1).float()
    return out


def _check(query, key, value, cache, batch, window, softcap, sinks) -> None:
    tokens = batch.num_tokens
    wanted = (
        ("query", query, (query.shape[0], tokens, cache.key_dim)),
        ("key", key, (cache.num_kv_heads, tokens, cache.key_dim)),
        ("value", value, (cache.num_kv_heads, tokens, cache.value_dim)),
    )
    for name, tensor, shape in wanted:
        if tensor.shape != shape or tensor.dtype is not torch.float32 or tensor.stride(2) != 1:
            found = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{name} must be float32 {shape} with a contiguous last dimension, found {found}")
    if not query.shape[0] or query.shape[0] % cache.num_kv_heads:
        raise ValueError(f"heads must be a multiple of {cache.num_kv_heads} KV heads, found {query.shape[0]}")
    if window is not None and window < 1:
        raise ValueError(f"window must be None or at least 1, found {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or positive, found {softcap}")
    if sinks is not None and (
        sinks.dtype is not torch.float32 or sinks.shape != (query.shape[0],) or not sinks.is_contiguous()
    ):
        raise ValueError(f"sinks must be float32 ({query.shape[0]},), found {sinks.dtype} {tuple(sinks.shape)}")


def _rows(tensor: torch.Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
