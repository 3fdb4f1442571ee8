"""Root-mean-square normalisation, with the residual addition before it in the same pass."""

from __future__ import annotations

import torch

from mxn_kernels.ops.checks import check_rows, need, target_of
from mxn_kernels.select import select
from mxn_kernels.target import Target

MAX_WIDTH = 32768  # a row stays in one program's registers


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    implementation: str | None = None,
    target: Target | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, computed in fp32.

    Args:
      x (..., n): rows contiguous. weight (n). offset: 1 for models that store weight - 1 (Gemma).
      residual, of x's shape and dtype: added first; the sum, rounded to x's dtype, is what is normalised.
    Returns: x's shape and dtype; with a residual also the sum.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    need(x.dim() >= 1, "x must have at least one dimension")
    width = x.shape[-1]
    check_rows("weight", weight, (width,))
    rows = x.reshape(-1, width)
    check_rows("x", rows, (None, width))
    need(0 < width <= MAX_WIDTH, f"rows must have 1 to {MAX_WIDTH} elements, found {width}")
    need(weight.device == x.device, f"x is on {x.device}, weight on {weight.device}")
    target = target_of(x, target, x.dtype, weight.dtype)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    total = None
    if residual is not None:
        same = residual.shape == x.shape and residual.dtype is x.dtype and residual.device == x.device
        need(
            same, f"residual must be like x, {x.dtype} {tuple(x.shape)}, found {residual.dtype} {tuple(residual.shape)}"
        )
        residual = residual.reshape(-1, width)
        check_rows("residual", residual, (None, width))
        total = torch.empty_like(out)
    select("rms_norm", target, implementation)(
        rows, weight, eps, offset=offset, residual=residual, out=out, total=total, target=target
    )
    return out.view(x.shape) if total is None else (out.view(x.shape), total.view(x.shape))


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    out: torch.Tensor,
    total: torch.Tensor | None = None,
    target: Target | None = None,
) -> None:
    """The same in torch, in float64, over rows (rows, n)."""
    if residual is not None:
        x = (x.float() + residual.float()).to(x.dtype)
        total.copy_(x)
    wide = x.double()
    out.copy_(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (weight.double() + offset))
