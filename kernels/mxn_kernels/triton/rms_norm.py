"""RMS norm: a program takes whole rows, several where they are short (query and key norms of one head)."""

import torch
import triton
import triton.language as tl

from mxn_kernels.target import Target
from mxn_kernels.triton.launch import INTERPRET, launch

TILE_ELEMENTS = 2048  # per program at least, where rows are shorter


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    target: Target,
) -> None:
    num_rows, width = x.shape
    block = triton.next_power_of_2(width)
    rows = max(1, TILE_ELEMENTS // block)
    # Eight elements for each thread: one 16-byte access in half precision.
    num_warps = min(16, max(1, rows * block // (target.warp_size * 8)))
    launch(
        _rms_norm_kernel,
        (triton.cdiv(num_rows, rows),),
        options={"num_warps": num_warps},
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight,
        out_ptr=out,
        total_ptr=total,
        num_rows=num_rows,
        width=width,
        eps=eps,
        offset=offset,
        stride_x=x.stride(0),
        stride_r=0 if residual is None else residual.stride(0),
        ROWS=rows,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        INTERPRET=INTERPRET,
    )


@triton.jit(do_not_specialize=["num_rows"])  # these follow the batch
def _rms_norm_kernel(
    x_ptr,  # [rows, width], as residual; out and total are contiguous
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    num_rows,
    width,
    eps,
    offset,
    stride_x,
    stride_r,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < width)
    x = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows * stride_r + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(total_ptr + rows * width + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32) + offset
    tl.store(out_ptr + rows * width + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)
