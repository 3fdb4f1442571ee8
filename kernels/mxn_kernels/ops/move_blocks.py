"""Copies whole blocks between two arrays of blocks: within a cache, into a staging buffer, or back."""

from __future__ import annotations

import torch

from mxn_kernels.ops.checks import check_index, need, target_of
from mxn_kernels.select import select
from mxn_kernels.target import Target

WORD_BYTES = 16  # blocks and their distance are multiples of it


def move_blocks(
    source: torch.Tensor,
    destination: torch.Tensor,
    source_ids: torch.Tensor | None,
    destination_ids: torch.Tensor | None,
    *,
    check_ids: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> None:
    """Copies source[source_ids[i]] to destination[destination_ids[i]] for every i, in no particular order.

    No destination may be another move's source or destination. Ids of None stand for 0, 1, 2...: gathering and
    scattering.
    Args: source, destination (blocks, bytes) uint8, of equal bytes, a multiple of 16; ids (n) int32 on the chip.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    ids = {"source_ids": source_ids, "destination_ids": destination_ids}
    given = [tensor for tensor in ids.values() if tensor is not None]
    need(bool(given), "source_ids or destination_ids must be given")
    count = given[0].shape[0] if given[0].dim() else 0
    for name, blocks in (("source", source), ("destination", destination)):
        fits = blocks.dtype is torch.uint8 and blocks.dim() == 2 and blocks.shape[1] == source.shape[1]
        need(fits, f"{name} must be uint8 (blocks, {source.shape[-1]}), found {blocks.dtype} {tuple(blocks.shape)}")
        aligned = blocks.stride(1) == 1 and not (blocks.shape[1] % WORD_BYTES or blocks.stride(0) % WORD_BYTES)
        need(
            aligned, f"{name} must hold contiguous blocks of a multiple of {WORD_BYTES} bytes, found {blocks.stride()}"
        )
        need(
            blocks.is_meta or blocks.data_ptr() % WORD_BYTES == 0,
            f"{name} must start at a multiple of {WORD_BYTES} bytes",
        )
        need(blocks.device == source.device, f"source is on {source.device}, destination on {destination.device}")
    for name, tensor in ids.items():
        blocks = source if name == "source_ids" else destination
        if tensor is None:
            need(blocks.shape[0] >= count, f"{name} of None needs {count} blocks, found {blocks.shape[0]}")
            continue
        check_index(name, tensor, (count,), source.device)
        if check_ids:
            limit = blocks.shape[0]
            need(
                all(0 <= i < limit for i in tensor.tolist()),
                f"{name} must be 0 to {limit} (exclusive), found {tensor.tolist()}",
            )
    target = target_of(source, target)
    select("move_blocks", target, implementation)(source, destination, source_ids, destination_ids, target=target)


def move_blocks_reference(
    source: torch.Tensor,
    destination: torch.Tensor,
    source_ids: torch.Tensor | None,
    destination_ids: torch.Tensor | None,
    *,
    target: Target | None = None,
) -> None:
    """The same in torch."""
    count = (source_ids if source_ids is not None else destination_ids).shape[0]
    moved = source[:count] if source_ids is None else source[source_ids.long()]
    if destination_ids is None:
        destination[:count] = moved
    else:
        destination[destination_ids.long()] = moved
