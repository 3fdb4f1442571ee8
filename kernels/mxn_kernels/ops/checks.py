"""Checks that several ops make of their arguments. Each raises ValueError with what was found and what was expected."""

from __future__ import annotations

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.target import FP8_DTYPES, Target

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def need(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def target_of(tensor: torch.Tensor, target: Target | None, *dtypes: torch.dtype) -> Target:
    """The chip that will run, able to compute in all `dtypes`."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        current = torch.cuda.current_device()
        raise ValueError(
            f"tensors are on {tensor.device}, the current device is cuda:{current}; use torch.cuda.set_device"
        )
    target = target or Target.of(tensor.device)
    # On a CPU without the interpreter only the reference runs, and it takes every dtype.
    if target.vendor != "cpu":
        for dtype in dtypes:
            need(target.supports(dtype), f"{target.name} has no {_name(dtype)}; it has {_names(target)}")
    return target


def check_rows(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtypes=FLOATS) -> None:
    """Shape (None fits any size), dtype, and a contiguous last dimension."""
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    need(fits, f"{name} must have shape {wanted}, found {tuple(tensor.shape)}")
    need(tensor.dtype in dtypes, f"{name} must be {' or '.join(map(_name, dtypes))}, found {_name(tensor.dtype)}")
    contiguous = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    need(contiguous, f"{name} must be contiguous in its last dimension, found strides {tensor.stride()}")


def check_index(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    check_rows(name, tensor, shape, (torch.int32,))
    need(tensor.device == device, f"{name} must be on {device}, found {tensor.device}")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    good = num_heads > 0 and num_heads % num_kv_heads == 0
    need(good, f"query heads must be a multiple of {num_kv_heads} KV heads, found {num_heads}")


def check_attention(
    query: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    check_rows("query", query, (None, None, cache.key_dim))
    check_heads(query.shape[1], cache.num_kv_heads)
    need(query.device == cache.keys.device, f"query is on {query.device}, the cache on {cache.keys.device}")
    matching = cache.dtype in (query.dtype, *FP8_DTYPES)
    need(matching, f"the cache must be {_name(query.dtype)} like the query, or fp8; found {_name(cache.dtype)}")
    check_index("context_lens", context_lens, (None,), query.device)
    check_index("block_table", block_table, (context_lens.shape[0], None), query.device)
    need(scaling > 0, f"scaling must be positive, found {scaling}")
    need(window is None or window >= 1, f"window must be None or at least 1, found {window}")
    need(softcap is None or softcap > 0, f"softcap must be None or positive, found {softcap}")
    if sinks is not None:
        check_rows("sinks", sinks, (query.shape[1],))
        need(sinks.device == query.device, f"sinks must be on {query.device}, found {sinks.device}")


def check_ids_in_range(cache: KVCache, block_table: torch.Tensor, context_lens: torch.Tensor) -> None:
    """The debug check: reads the tables back, which waits for the chip."""
    table, contexts = block_table.tolist(), context_lens.tolist()
    room = block_table.shape[1] * cache.block_size
    for seq, (row, context) in enumerate(zip(table, contexts, strict=True)):
        need(
            0 <= context <= room,
            f"context_lens[{seq}] is {context}; its row of the block table holds 0 to {room} tokens",
        )
        for block in row[: -(-context // cache.block_size)]:
            known = 0 <= block < cache.num_blocks
            need(known, f"block_table row {seq} names block {block}; blocks are 0 to {cache.num_blocks} (exclusive)")


def check_out(out: torch.Tensor | None, query: torch.Tensor, value_dim: int) -> torch.Tensor:
    """The output to fill: the caller's, checked, or a new one."""
    if out is None:
        return torch.empty((*query.shape[:2], value_dim), dtype=query.dtype, device=query.device)
    check_rows("out", out, (*query.shape[:2], value_dim), (query.dtype,))
    need(out.device == query.device, f"out must be on {query.device}, found {out.device}")
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(target: Target) -> str:
    return ", ".join(_name(dtype) for dtype in (*FLOATS, *FP8_DTYPES) if target.supports(dtype))
