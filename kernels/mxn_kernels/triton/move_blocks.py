"""Copies blocks as 64-bit words: a program takes one piece of one block."""

import torch
import triton
import triton.language as tl

from mxn_kernels.target import Target
from mxn_kernels.triton.launch import launch

PIECE = 2048  # words of 8 bytes per program


def move_blocks(
    source: torch.Tensor,
    destination: torch.Tensor,
    source_ids: torch.Tensor | None,
    destination_ids: torch.Tensor | None,
    *,
    target: Target,
) -> None:
    count = (source_ids if source_ids is not None else destination_ids).shape[0]
    source, destination = source.view(torch.int64), destination.view(torch.int64)
    num_words = source.shape[1]
    piece = min(PIECE, triton.next_power_of_2(num_words))
    launch(
        _move_blocks_kernel,
        (count, triton.cdiv(num_words, piece)),
        options={"num_warps": 4},
        source_ptr=source,
        destination_ptr=destination,
        source_ids_ptr=source_ids,
        destination_ids_ptr=destination_ids,
        num_words=num_words,
        stride_s=source.stride(0),
        stride_d=destination.stride(0),
        PIECE=piece,
        HAS_SOURCE_IDS=source_ids is not None,
        HAS_DESTINATION_IDS=destination_ids is not None,
    )


@triton.jit(do_not_specialize_on_alignment=["source_ids_ptr", "destination_ids_ptr"])  # these follow the batch
def _move_blocks_kernel(
    source_ptr,
    destination_ptr,
    source_ids_ptr,
    destination_ids_ptr,
    num_words,
    stride_s,
    stride_d,
    PIECE: tl.constexpr,
    HAS_SOURCE_IDS: tl.constexpr,
    HAS_DESTINATION_IDS: tl.constexpr,
):
    move = tl.program_id(0).to(tl.int64)
    source = move
    destination = move
    if HAS_SOURCE_IDS:
        source = tl.load(source_ids_ptr + move).to(tl.int64)
    if HAS_DESTINATION_IDS:
        destination = tl.load(destination_ids_ptr + move).to(tl.int64)
    words = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    mask = words < num_words
    moved = tl.load(source_ptr + source * stride_s + words, mask=mask)
    tl.store(destination_ptr + destination * stride_d + words, moved, mask=mask)
