"""The attention backend interface. From here down torch may be imported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKV:
    """Shape of one layer's KV cache. `window`: tokens a query sees including itself, None for all."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a flat ragged batch live: T tokens of S sequences. All are int32 unless said otherwise.

    query_starts (S + 1): first flat index of each sequence's tokens; last entry is T.
    context_lens (S): tokens in the cache after this step, new ones included; >= query length.
    block_table (S, max_blocks): block ids in order; entries past the end are 0.
    slot_mapping (T): block_id * block_size + offset for each new token; -1 is not written.
    max_query_len: longest query; 1 means a pure decode step.
    """

    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int

    @property
    def num_tokens(self) -> int:
        return int(self.slot_mapping.shape[0])

    @property
    def num_seqs(self) -> int:
        return int(self.context_lens.shape[0])


def to_chip(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the chip, once the chip gets there: the host does not wait for what it is doing now."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory, the copy may wait for the steps before it
    return tensor.to(device, non_blocking=True)


class AttentionBackend(ABC):
    """Paged attention with its KV cache for all layers of one model."""

    name: ClassVar[str]

    def __init__(self, layers: Sequence[LayerKV], num_blocks: int, block_size: int) -> None:
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        self.block_size = block_size

    @classmethod
    @abstractmethod
    def bytes_per_block(cls, layers: Sequence[LayerKV], block_size: int) -> int:
        """KV bytes of one block over all layers, as this backend stores them."""

    @abstractmethod
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
        """Writes the new keys and values into the cache, then attends causally over each sequence's whole context.

        Args: query (num_heads, T, key_dim), key (num_kv_heads, T, key_dim), value (num_kv_heads, T, value_dim): rotary
          embedding applied, any strides; num_heads is a multiple of num_kv_heads and head h reads KV head
          h // (num_heads // num_kv_heads). sinks (num_heads,): raw logits added to each softmax's denominator.
        Returns: (T, num_heads, value_dim), contiguous, dtype of query.
        Raises: ValueError naming the shape found and the one expected.
        """

    @abstractmethod
    def copy_blocks(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, destination) in order, in every layer."""
