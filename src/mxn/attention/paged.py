"""Paged attention on the kernels of `mxn_kernels`, which only this, quantisation and the step program import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from mxn_kernels import KernelUnavailable
from mxn_kernels.copy_blocks import copy_blocks
from mxn_kernels.cpu import Workspace, load_library
from mxn_kernels.cpu_cache import KvDtype, LayerCache
from mxn_kernels.paged_attention import PagedBatch, paged_attention

from mxn.attention.base import AttentionBackend, AttentionMetadata, LayerKV
from mxn.errors import KernelUnavailableError


def prepare_cpu_kernels(isa: str | None = None) -> str:
    """Builds the kernel library if the cache lacks it (seconds), loads it, and returns its instruction set.

    Raises: KernelUnavailableError with the reason: no compiler, no folder to write to, or an unfit CPU.
    """
    try:
        return load_library(isa).isa
    except KernelUnavailable as error:
        raise KernelUnavailableError(str(error)) from error


class PagedCpuAttention(AttentionBackend):
    """C++ kernels over a KV cache in half precision or 8 bits.

    A row's result depends on its own sequence alone, bit for bit: not on the batch, threads, or how a prompt was cut.
    """

    name: ClassVar[str] = "cpu-cpp"

    def __init__(
        self,
        layers: Sequence[LayerKV],
        num_blocks: int,
        block_size: int,
        *,
        threads: int | None = None,
        isa: str | None = None,
        kv_dtype: KvDtype = "fp16",
    ) -> None:
        """Args: threads: None for torch's number. isa: instruction set to build for, None for the CPU's best.
          kv_dtype: "fp16", or "int8" with a scale per token and KV head, which takes little over half the memory.

        Raises: KernelUnavailableError with the reason; ValueError if block_size is not a multiple of 16.
        """
        super().__init__(layers, num_blocks, block_size)
        prepare_cpu_kernels(isa)
        self.workspace = Workspace.shared(threads or torch.get_num_threads(), isa)
        self.caches = [
            LayerCache.allocate(
                num_blocks=num_blocks,
                block_size=block_size,
                num_kv_heads=layer.num_kv_heads,
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                kv_dtype=kv_dtype,
            )
            for layer in layers
        ]
        self._meta: AttentionMetadata | None = None
        self._batch: PagedBatch | None = None

    @classmethod
    def bytes_per_block(cls, layers: Sequence[LayerKV], block_size: int, *, kv_dtype: KvDtype = "fp16") -> int:
        return sum(
            LayerCache.bytes_per_block(
                block_size=block_size,
                num_kv_heads=layer.num_kv_heads,
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                kv_dtype=kv_dtype,
            )
            for layer in layers
        )

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
        if meta is not self._meta:  # one step's batch serves all layers
            self._batch = PagedBatch(meta.query_starts, meta.context_lens, meta.block_table, meta.slot_mapping)
            self._meta = meta
        dtype = query.dtype
        out = paged_attention(
            _float_rows(query),
            _float_rows(key),
            _float_rows(value),
            self.caches[layer],
            self._batch,
            scaling=scaling,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.float().contiguous(),
            workspace=self.workspace,
        )
        return out if dtype is torch.float32 else out.to(dtype)

    def copy_blocks(self, moves: Sequence[tuple[int, int]]) -> None:
        for cache in self.caches:
            copy_blocks(cache, moves, workspace=self.workspace)


def _float_rows(tensor: torch.Tensor) -> torch.Tensor:
    """float32 with a contiguous last dimension, which is what the kernels read; usually the tensor itself."""
    if tensor.dtype is not torch.float32:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
