"""silu(gate) * up: a program takes a piece of one row."""

import torch
import triton
import triton.language as tl

from mxn_kernels.target import Target
from mxn_kernels.triton.launch import launch

PIECE = 2048


def silu_mul(gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor, target: Target) -> None:
    num_rows, width = gate.shape
    piece = min(PIECE, max(16, triton.next_power_of_2(width)))
    launch(
        _silu_mul_kernel,
        (num_rows, triton.cdiv(width, piece)),
        options={"num_warps": max(1, min(8, piece // (target.warp_size * 8)))},
        gate_ptr=gate,
        up_ptr=up,
        out_ptr=out,
        width=width,
        stride_g=gate.stride(0),
        stride_u=up.stride(0),
        PIECE=piece,
    )


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, width, stride_g, stride_u, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    mask = columns < width
    gate = tl.load(gate_ptr + row * stride_g + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_u + columns, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
