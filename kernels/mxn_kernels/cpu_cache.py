"""One layer's keys and values as the CPU kernels store them, in half precision or in 8 bits.

Sixteen tokens of one KV head make a sub-block: keys [key_dim][16], values [16][pitch], where the pitch is value_dim
rounded up to 16. In 8 bits each is preceded by sixteen float32 scales: a row is rounded by its own largest value.

| kv_dtype | bytes of a token and KV head, key_dim = value_dim = 64 |
|---|---|
| fp16 | 256 |
| int8 | 136 |
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch

from mxn_kernels.cpu.library import aligned_empty
from mxn_kernels.packed_linear import round_up, rounded_rows

LANES = 16
"""Tokens of a sub-block."""
MAX_INT8_KEY_DIM = 1024

KvDtype = Literal["fp16", "int8"]
_KINDS: dict[KvDtype, int] = {"fp16": 0, "int8": 1}
_SCALE_BYTES = 4


class _Layer(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *[(name, ctypes.c_int32) for name in ("num_blocks", "block_size", "num_kv_heads")],
        *[(name, ctypes.c_int32) for name in ("key_dim", "value_dim", "value_pitch", "kind")],
    ]


@dataclass(frozen=True, eq=False)
class LayerCache:
    """keys, values: uint8 (blocks, KV heads, sub-blocks, bytes of a sub-block)."""

    keys: torch.Tensor
    values: torch.Tensor
    num_blocks: int
    block_size: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    kv_dtype: KvDtype

    @staticmethod
    def bytes_per_block(
        *, block_size: int, num_kv_heads: int, key_dim: int, value_dim: int, kv_dtype: KvDtype = "fp16"
    ) -> int:
        widths = key_dim, round_up(value_dim, LANES)
        return num_kv_heads * block_size // LANES * sum(_sub_bytes(width, kv_dtype) for width in widths)

    @classmethod
    def allocate(
        cls,
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        kv_dtype: KvDtype = "fp16",
    ) -> LayerCache:
        """Memory is zeroed, so its pages exist. Raises: ValueError on sizes or a type the kernels cannot use."""
        if kv_dtype not in _KINDS:
            raise ValueError(f"kv_dtype must be one of {', '.join(_KINDS)}, found {kv_dtype}")
        if block_size < LANES or block_size % LANES:
            raise ValueError(f"block_size must be a multiple of {LANES}, found {block_size}")
        if min(num_blocks, num_kv_heads, key_dim, value_dim) < 1 or num_blocks * block_size >= 2**31:
            found = f"{num_blocks} blocks, {num_kv_heads} heads, dims {key_dim} and {value_dim}"
            raise ValueError(f"a cache needs at least one of each and fewer than 2^31 slots, found {found}")
        if kv_dtype == "int8" and key_dim > MAX_INT8_KEY_DIM:
            raise ValueError(f"8-bit keys may have {MAX_INT8_KEY_DIM} dimensions, found {key_dim}")
        shape = (num_blocks, num_kv_heads, block_size // LANES)
        parts = []
        for width in (key_dim, round_up(value_dim, LANES)):
            whole = (*shape, _sub_bytes(width, kv_dtype))
            parts.append(aligned_empty(torch.Size(whole).numel()).zero_().view(whole))
        return cls(*parts, num_blocks, block_size, num_kv_heads, key_dim, value_dim, kv_dtype)

    def __post_init__(self) -> None:
        sizes = (self.num_blocks, self.block_size, self.num_kv_heads, self.key_dim, self.value_dim)
        pitch, kind = round_up(self.value_dim, LANES), _KINDS[self.kv_dtype]
        struct = _Layer(self.keys.data_ptr(), self.values.data_ptr(), *sizes, pitch, kind)
        object.__setattr__(self, "struct", struct)
        object.__setattr__(self, "address", ctypes.addressof(struct))

    def gather(self, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (kv_heads, length, key_dim) and values (kv_heads, length, value_dim) of a sequence, float32."""
        found = []
        for part, width, turned in ((self.keys, self.key_dim, True), (self.values, self.value_dim, False)):
            numbers, scales = _split(part[blocks.long()], self.kv_dtype)
            rows = numbers.unflatten(-1, (-1, LANES)).mT if turned else numbers.unflatten(-1, (LANES, -1))
            rows = rows.float() if scales is None else rows.float() * scales[..., None]
            found.append(rows[..., :width].transpose(0, 1).reshape(self.num_kv_heads, -1, width)[:, :length])
        return found[0], found[1]

    def put(self, slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores one token as the kernels do, in torch. Args: key (kv_heads, key_dim), value (kv_heads, value_dim)."""
        block, sub, lane = slot // self.block_size, slot % self.block_size // LANES, slot % LANES
        for part, row, turned in ((self.keys, key, True), (self.values, value, False)):
            numbers, scales = _split(part[block, :, sub], self.kv_dtype)
            if scales is None:
                stored = row.half()
            else:
                whole, scale = rounded_rows(row.float())
                stored, scales[:, lane] = whole.to(torch.int8), scale[:, 0]
            if turned:
                numbers.unflatten(-1, (-1, LANES))[..., lane] = stored
            else:
                numbers.unflatten(-1, (LANES, -1))[:, lane, : row.shape[-1]] = stored


def _sub_bytes(width: int, kv_dtype: KvDtype) -> int:
    return LANES * (2 * width if kv_dtype == "fp16" else width + _SCALE_BYTES)


def _split(part: torch.Tensor, kv_dtype: KvDtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers (..., 16 x width) and, of 8 bits, scales (..., 16), as views if `part` is one."""
    if kv_dtype == "fp16":
        return part.view(torch.float16), None
    head = LANES * _SCALE_BYTES
    # A view to another type needs a last dimension of stride 1, which a slice has.
    return part[..., head:].view(torch.int8), part[..., :head].view(torch.float32)
