"""One layer's keys and values in blocks, and the layout that all ops here share.

A block's bytes lie together, so that copying or offloading a block is one contiguous piece:

    keys    [num_kv_heads, block_size, key_dim]
    values  [num_kv_heads, block_size, value_dim]
    scales  float32 [2, num_kv_heads, block_size], keys' then values': only an fp8 cache scaled per token and head

Where key_dim equals value_dim this is [num_blocks, 2, num_kv_heads, block_size, head_dim]. Ops take strides from the
tensors, so a cache whose heads and tokens are swapped in memory works as well; only the last dimension must be
contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mxn_kernels.target import FP8_DTYPES

CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, *FP8_DTYPES)
_ALIGNMENT = 16  # bytes: the widest load of a thread

Scaling = Literal["none", "tensor", "token_head"]


@dataclass(frozen=True, eq=False, slots=True)
class KVCache:
    """Views of one layer's cache.

    keys (num_blocks, num_kv_heads, block_size, key_dim), values likewise with value_dim, of one dtype.
    key_scale, value_scale: what a stored number is multiplied by. None; one float32 for all; or float32
      (num_blocks, num_kv_heads, block_size). Only fp8 has scales.
    blocks (num_blocks, bytes) uint8: the same memory, whole blocks. None where a block is not contiguous.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    blocks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            expected = "(num_blocks, num_kv_heads, block_size, dim)"
            raise ValueError(f"keys and values must be {expected}, found {tuple(keys.shape)} and {tuple(values.shape)}")
        if keys.dtype is not values.dtype or keys.dtype not in CACHE_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in CACHE_DTYPES)
            raise ValueError(f"keys and values must share one dtype of {known}, found {keys.dtype} and {values.dtype}")
        if keys.stride(3) != 1 or values.stride(3) != 1:
            raise ValueError(
                f"the last dimension must be contiguous, found strides {keys.stride()} and {values.stride()}"
            )
        if keys.device != values.device:
            raise ValueError(f"keys are on {keys.device}, values on {values.device}")
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            self._check_scale(name, scale)

    def _check_scale(self, name: str, scale: torch.Tensor | None) -> None:
        if (scale is None) != (self.key_scale is None):
            raise ValueError("key_scale and value_scale come together")
        if scale is None:
            return
        if not self.is_fp8:
            raise ValueError(f"{name} is for fp8 caches, found {self.keys.dtype}")
        if scale.dtype is not torch.float32 or (scale.numel() != 1 and scale.shape != self.keys.shape[:3]):
            expected = f"float32, one number or {tuple(self.keys.shape[:3])}"
            raise ValueError(f"{name} must be {expected}, found {scale.dtype} {tuple(scale.shape)}")

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def key_dim(self) -> int:
        return self.keys.shape[3]

    @property
    def value_dim(self) -> int:
        return self.values.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def is_fp8(self) -> bool:
        return self.keys.dtype in FP8_DTYPES

    @property
    def scaling(self) -> Scaling:
        if self.key_scale is None:
            return "none"
        return "tensor" if self.key_scale.numel() == 1 else "token_head"

    @staticmethod
    def bytes_per_block(
        *,
        block_size: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        scaling: Scaling = "none",
    ) -> int:
        rows = num_kv_heads * block_size
        size = rows * (key_dim + value_dim) * dtype.itemsize + (8 * rows if scaling == "token_head" else 0)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        *,
        block_size: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        scaling: Scaling = "none",
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Memory is not cleared: ops read no slot that was not written.

        With scaling "tensor" both scales start at 1.
        """
        value_dim = key_dim if value_dim is None else value_dim
        if min(num_blocks, block_size, num_kv_heads, key_dim, value_dim) < 1:
            found = f"{num_blocks} blocks of {block_size}, {num_kv_heads} heads, dims {key_dim} and {value_dim}"
            raise ValueError(f"a cache needs at least one of each, found {found}")
        if (num_kv_heads * block_size * min(key_dim, value_dim) * dtype.itemsize) % 4:
            raise ValueError("a block's keys and values must each take a multiple of 4 bytes")
        shape = {"block_size": block_size, "num_kv_heads": num_kv_heads, "key_dim": key_dim, "value_dim": value_dim}
        size = cls.bytes_per_block(**shape, dtype=dtype, scaling=scaling)
        blocks = torch.empty((num_blocks, size), dtype=torch.uint8, device=device)
        rows = num_kv_heads * block_size
        ends = [rows * key_dim * dtype.itemsize, rows * (key_dim + value_dim) * dtype.itemsize]

        def part(start: int, end: int, kind: torch.dtype, *dims: int) -> torch.Tensor:
            return blocks[:, start:end].view(kind).unflatten(1, dims)

        key_scale = value_scale = None
        if scaling == "tensor":
            key_scale, value_scale = (torch.ones(1, device=device) for _ in range(2))
        elif scaling == "token_head":
            key_scale, value_scale = (
                part(start, start + 4 * rows, torch.float32, num_kv_heads, block_size)
                for start in (ends[1], ends[1] + 4 * rows)
            )
        return cls(
            part(0, ends[0], dtype, num_kv_heads, block_size, key_dim),
            part(ends[0], ends[1], dtype, num_kv_heads, block_size, value_dim),
            key_scale,
            value_scale,
            blocks,
        )

    def gather(
        self, block_ids: torch.Tensor, length: int, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (length, num_kv_heads, key_dim) and values of a sequence, scales applied, for the references."""
        index = block_ids[: -(-length // self.block_size)].long()
        found = []
        for stored, scale in ((self.keys, self.key_scale), (self.values, self.value_scale)):
            rows = _index(stored, index).to(dtype)
            if scale is not None:
                rows = rows * (scale.to(dtype) if scale.numel() == 1 else scale[index].to(dtype)[..., None])
            found.append(rows.transpose(1, 2).flatten(0, 1)[:length])
        return found[0], found[1]


def _index(stored: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Indexing, which torch lacks for fp8 on some devices."""
    if stored.dtype in FP8_DTYPES:
        return stored.view(torch.uint8)[index].view(stored.dtype)
    return stored[index]
