"""Paged attention on the ops of `mxn_kernels`: Triton on CUDA and ROCm chips, a vendor's own kernels where registered.

Keys and values are written first; then sequences with one new token go to the decode kernel, all others to prefill.
What that needs to know about a step is decided on the host, once for all layers (`plan_step`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from mxn_kernels import KernelUnavailable, ops
from mxn_kernels.flash_attention import why_not_flash_attention
from mxn_kernels.flashinfer_attention import why_not_flashinfer
from mxn_kernels.kv_cache import KVCache, Scaling
from mxn_kernels.shared_prefix import LAUNCH_BYTES, PrefixGroup, SharedPrefix, groups_that_pay
from mxn_kernels.target import Target

from mxn.attention.base import AttentionBackend, AttentionMetadata, LayerKV, to_chip
from mxn.errors import KernelUnavailableError

_LIBRARIES = {"flash-attention-3": why_not_flash_attention, "flashinfer": why_not_flashinfer}
PREFILLS = (*_LIBRARIES, "triton")
"""Who may compute prefill attention, in order of preference."""

LONG_CONTEXT = 2048
"""A decode row in the prefill kernel is one program that walks its whole context. Over this many tokens that outlasts
the launch it saves. Reckoned, not measured: 16 tiles of 128 tokens at about a microsecond each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMetadata(AttentionMetadata):
    """Metadata whose tensors are on the chip, with what was decided on the host.

    num_decodes: sequences at the front that go to the decode kernel, one new token each; the rest go to prefill.
    prefill_starts (S - num_decodes + 1): where the others' tokens begin, counted from the first of them.
    prefill_table, prefill_contexts: their rows of block_table and context_lens, the same objects for all layers.
    max_context: an upper bound of context_lens; it decides how decode splits its work.
    prefix: groups of decoding sequences whose shared blocks are read once; None where that does not pay.
    """

    num_decodes: int
    prefill_starts: torch.Tensor
    prefill_table: torch.Tensor
    prefill_contexts: torch.Tensor
    max_context: int
    prefix: SharedPrefix | None = None


class TritonAttention(AttentionBackend):
    """`mxn_kernels.ops` over caches of [blocks, 2, KV heads, block, head size]; padded rows have a context of 0."""

    def __init__(
        self,
        layers: Sequence[LayerKV],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        scaling: Scaling = "none",
        device: torch.device | str = "cuda",
        num_heads: int | None = None,
        num_splits: int | None = None,
        prefill: str = "auto",
        launch_bytes: int = LAUNCH_BYTES,
    ) -> None:
        """Args: dtype, scaling: of the cache. num_heads: query heads, to find out when shared prefixes pay; None for
          never. num_splits: a fixed number makes results independent of the batch, None chooses by it. prefill: a name
          in `PREFILLS`, or "auto" for the first that can be had. launch_bytes: traffic that a pass over shared prefixes
          must save in a layer.

        Raises: KernelUnavailableError with the reason; OutOfMemoryError of torch.
        """
        super().__init__(layers, num_blocks, block_size)
        self.device = torch.device(device)
        self.num_heads, self.num_splits, self.launch_bytes = num_heads, num_splits, launch_bytes
        self.caches = [
            KVCache.allocate(num_blocks, **_shape(layer, block_size), dtype=dtype, scaling=scaling, device=device)
            for layer in self.layers
        ]
        self.target = Target.of(self.device)
        why_not = {name: why(self.target, self.caches) for name, why in _LIBRARIES.items()}
        if why_not.get(prefill):
            raise KernelUnavailableError(f"prefill by {prefill} was asked for and cannot be had: {why_not[prefill]}")
        if prefill == "auto":
            prefill = next(name for name in PREFILLS if why_not.get(name) is None)
        self.prefill_name = prefill
        self.name = "triton" if prefill == "triton" else f"triton, prefill by {prefill}"
        others = "; ".join(f"{name} cannot: {why}" for name, why in why_not.items() if why)
        self.notes = (f"prefill attention by {prefill}" + (f"; {others}" if others else ""),)
        self._planned: tuple[AttentionMetadata, PlannedMetadata] | None = None

    @classmethod
    def bytes_per_block(
        cls,
        layers: Sequence[LayerKV],
        block_size: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        scaling: Scaling = "none",
        **_: object,
    ) -> int:
        return sum(
            KVCache.bytes_per_block(**_shape(layer, block_size), dtype=dtype, scaling=scaling) for layer in layers
        )

    def find_groups(self, block_table: torch.Tensor, context_lens: torch.Tensor) -> tuple[PrefixGroup, ...]:
        """Rows of a decode step whose shared blocks are worth a pass of their own. Args: int32, on the host."""
        full = [cache for cache, layer in zip(self.caches, self.layers, strict=True) if layer.window is None]
        if self.num_heads is None or not full or context_lens.shape[0] < 2:
            return ()
        return groups_that_pay(
            block_table, context_lens, full[0], num_heads=self.num_heads, launch_bytes=self.launch_bytes
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
        plan = meta if isinstance(meta, PlannedMetadata) else self._plan(meta)
        cache = self.caches[layer]
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        out = query.new_empty(query.shape[0], query.shape[1], cache.value_dim)
        rules = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        try:
            ops.write_kv(key, value, cache, plan.slot_mapping)
            if plan.num_decodes:
                self._decode(query, cache, plan, window, out, rules)
            if plan.num_decodes < plan.num_seqs:
                first = plan.num_decodes
                ops.ragged_prefill(
                    query[first:],
                    cache,
                    plan.prefill_table,
                    plan.prefill_starts,
                    plan.prefill_contexts,
                    window=window,
                    out=out[first:],
                    implementation=None if self.prefill_name == "triton" or sinks is not None else self.prefill_name,
                    **rules,
                )
        except KernelUnavailable as error:
            raise KernelUnavailableError(str(error)) from error
        return out

    def copy_blocks(self, moves: Sequence[tuple[int, int]]) -> None:
        ops.copy_blocks(self.caches, moves)

    def _decode(
        self,
        query: torch.Tensor,
        cache: KVCache,
        plan: PlannedMetadata,
        window: int | None,
        out: torch.Tensor,
        rules: dict[str, object],
    ) -> None:
        rows = slice(0, plan.num_decodes)
        inputs = (query[rows], cache, plan.block_table[rows], plan.context_lens[rows])
        if plan.prefix is not None and window is None:  # within a window, queries see different parts of a prefix
            ops.shared_prefix_decode(
                *inputs,
                plan.prefix,
                num_splits=self.num_splits,
                max_tail=plan.max_context,
                out=out[rows],
                **rules,
            )
            return
        ops.paged_decode(
            *inputs, window=window, num_splits=self.num_splits, max_context=plan.max_context, out=out[rows], **rules
        )

    def _plan(self, meta: AttentionMetadata) -> PlannedMetadata:
        """The plan of metadata that came without one; one step's serves all layers."""
        if self._planned is None or self._planned[0] is not meta:
            self._planned = (meta, plan_step(meta, self, self.device))
        return self._planned[1]


def plan_step(host: AttentionMetadata, attention: TritonAttention, device: torch.device) -> PlannedMetadata:
    """Decides how a step runs and puts its tensors on the chip. Cheap if they are on the host, which they should be."""
    starts, contexts = host.query_starts.tolist(), host.context_lens.tolist()
    num_decodes = decodes_at_front([end - start for start, end in pairwise(starts)], contexts)
    prefix = None
    groups = ()
    if num_decodes == len(contexts):
        groups = attention.find_groups(host.block_table.cpu(), host.context_lens.cpu())
    if groups:
        size = {"num_seqs": num_decodes, "block_size": attention.block_size}
        prefix = SharedPrefix.of(groups, **size, device=device)
    prefill_starts = host.query_starts[num_decodes:] - num_decodes

    context_lens, block_table = to_chip(host.context_lens, device), to_chip(host.block_table, device)
    return PlannedMetadata(
        query_starts=to_chip(host.query_starts, device),
        context_lens=context_lens,
        block_table=block_table,
        slot_mapping=to_chip(host.slot_mapping, device),
        max_query_len=host.max_query_len,
        num_decodes=num_decodes,
        prefill_starts=to_chip(prefill_starts, device),
        prefill_table=block_table[num_decodes:],
        prefill_contexts=context_lens[num_decodes:],
        max_context=max(contexts, default=0),
        prefix=prefix,
    )


class CapturedDecode:
    """The Triton backend's part in captured decode steps: which rows share a prefix, written where the graph reads it.

    parts: what it wants staged, by name: dtype and length.
    """

    MAX_GROUPS = 8

    def __init__(self, attention: TritonAttention, max_num_seqs: int, max_context: int) -> None:
        self._attention, self._max_context = attention, max_context
        self._block_size = attention.block_size
        lengths = SharedPrefix.room_shapes(max_num_seqs, self.MAX_GROUPS)
        self.parts = {name: (torch.int32, length) for name, length in lengths.items()}
        self._last: tuple[Sequence[int], tuple[PrefixGroup, ...]] = ((), ())

    def find_groups(self, seq_ids: Sequence[int], meta: AttentionMetadata) -> tuple[PrefixGroup, ...]:
        """Groups worth a pass of their own. While the same sequences decode, those of the step before still hold.

        Args: meta: on the host.
        """
        if seq_ids != self._last[0] or not all(_still_shared(meta.block_table, group) for group in self._last[1]):
            found = self._attention.find_groups(meta.block_table, meta.context_lens)
            self._last = (seq_ids, found[: self.MAX_GROUPS])
        return self._last[1]

    def fill(self, staged: Mapping[str, np.ndarray], groups: Sequence[PrefixGroup]) -> None:
        """Writes groups into the arrays named in `parts`."""
        SharedPrefix.fill(staged, groups, self._block_size)

    def metadata(
        self, meta: AttentionMetadata, staged: Mapping[str, torch.Tensor], *, shares_prefix: bool
    ) -> PlannedMetadata:
        """The plan of a decode step whose tensors are on the chip and change under the graph.

        Args: staged: the tensors of `parts`, of one padded size.
        """
        prefix = None
        if shares_prefix:
            num_seqs, width = meta.num_seqs, meta.block_table.shape[1]
            lengths = SharedPrefix.room_shapes(num_seqs, self.MAX_GROUPS)
            tensors = {name: staged[name][:length] for name, length in lengths.items()}
            prefix = SharedPrefix.room(tensors, max_prefix_blocks=width, num_seqs=num_seqs, block_size=self._block_size)
        return PlannedMetadata(
            query_starts=meta.query_starts,
            context_lens=meta.context_lens,
            block_table=meta.block_table,
            slot_mapping=meta.slot_mapping,
            max_query_len=1,
            num_decodes=meta.num_seqs,
            prefill_starts=meta.query_starts[:1],
            prefill_table=meta.block_table[:0],
            prefill_contexts=meta.context_lens[:0],
            max_context=self._max_context,
            prefix=prefix,
        )


def _still_shared(block_table: torch.Tensor, group: PrefixGroup) -> bool:
    rows = block_table[list(group.members), : group.num_blocks]
    return rows.shape[1] == group.num_blocks and bool((rows == rows[0]).all())


def fp8_dtype(device: torch.device) -> torch.dtype:
    """The 8-bit float that the chip converts by itself. Raises: KernelUnavailableError where it has none."""
    target = Target.of(device)
    if not target.fp8_dtypes:
        raise KernelUnavailableError(f"{target.name} has no fp8")
    return target.fp8_dtypes[0]


def decodes_at_front(query_lens: Sequence[int], context_lens: Sequence[int]) -> int:
    """How many sequences the decode kernel takes: those at the front with one new token, where that is worth a launch.

    Prefill takes the others in the same step. All of them where every sequence has one new token; none where no
    context among them is long, as prefill computes them on the way.
    """
    count = next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens))
    if count == len(query_lens):
        return count
    return count if any(context > LONG_CONTEXT for context in context_lens[:count]) else 0


def _shape(layer: LayerKV, block_size: int) -> dict[str, int]:
    return {
        "block_size": block_size,
        "num_kv_heads": layer.num_kv_heads,
        "key_dim": layer.key_dim,
        "value_dim": layer.value_dim,
    }
