"""Puts a step's new keys and values into the paged cache."""

from __future__ import annotations

import torch

from mxn_kernels.kv_cache import KVCache
from mxn_kernels.ops.checks import check_index, check_rows, need, target_of
from mxn_kernels.select import select
from mxn_kernels.target import FP8_DTYPES, Target


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    *,
    check_ids: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> None:
    """Writes each token's keys and values at its slot.

    Args:
      key (T, num_kv_heads, key_dim), value (T, num_kv_heads, value_dim): any strides but a contiguous last dimension.
      slot_mapping (T) int32: block_id * block_size + offset; -1 is not written. No slot comes twice.
      cache: of the key's dtype, or fp8. With one scale, numbers are divided by it and clamped to fp8's range; with a
        scale per token and head, that scale is computed (largest magnitude / fp8's largest) and written too.
      check_ids: reads the slots back and checks them, for debugging; waits for the chip.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    check_new_rows(key, value, cache, slot_mapping, check_ids)
    target = target_of(key, target, key.dtype, cache.dtype)
    select("write_kv", target, implementation)(key, value, cache, slot_mapping, target=target)


def write_kv_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    *,
    target: Target | None = None,
) -> None:
    """The same in torch."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    blocks, offsets = slots // cache.block_size, slots % cache.block_size
    for new, stored, scale in ((key, cache.keys, cache.key_scale), (value, cache.values, cache.value_scale)):
        rows = new[kept]
        if stored.dtype in FP8_DTYPES:
            rows = _to_fp8(rows.float(), stored.dtype, scale, blocks, offsets)
            stored, rows = stored.view(torch.uint8), rows.view(torch.uint8)
        stored[blocks, :, offsets] = rows


def check_new_rows(
    key: torch.Tensor, value: torch.Tensor, cache: KVCache, slot_mapping: torch.Tensor, check_ids: bool
) -> None:
    check_rows("key", key, (None, cache.num_kv_heads, cache.key_dim))
    check_rows("value", value, (key.shape[0], cache.num_kv_heads, cache.value_dim), (key.dtype,))
    matching = cache.dtype in (key.dtype, *FP8_DTYPES)
    need(matching, f"the cache must be {key.dtype} like the keys, or fp8; found {cache.dtype}")
    same = key.device == value.device == cache.keys.device
    need(same, f"key is on {key.device}, value on {value.device}, the cache on {cache.keys.device}")
    check_index("slot_mapping", slot_mapping, (key.shape[0],), key.device)
    if check_ids:
        limit = cache.num_blocks * cache.block_size
        taken = [slot for slot in slot_mapping.tolist() if slot != -1]
        for slot in taken:
            need(0 <= slot < limit, f"slots are -1 (not written) or 0 to {limit} (exclusive), found {slot}")
        need(len(set(taken)) == len(taken), "slot_mapping names a slot twice")


def _to_fp8(
    rows: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, blocks: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    if scale is not None and scale.numel() > 1:
        found = rows.abs().amax(-1) / largest
        scale[blocks, :, offsets] = found
        rows = rows / torch.where(found > 0, found, 1.0)[..., None]
    elif scale is not None:
        rows = rows / scale.reshape(())
    return rows.clamp(-largest, largest).to(dtype)
