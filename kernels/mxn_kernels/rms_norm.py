"""Root-mean-square normalisation: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

from __future__ import annotations

import torch

from mxn_kernels.cpu.library import Workspace


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, workspace: Workspace
) -> torch.Tensor:
    """Args: x (..., n) float32; weight (n,) float32; offset: 1 for models that store weight - 1.

    Returns: float32 of x's shape. Raises: ValueError if x does not fit the weight.
    """
    width = weight.shape[-1]
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not x.dim() or x.shape[-1] != width:
        raise ValueError(f"x must be float32 (..., {width}), found {x.dtype} {tuple(x.shape)}, weight {weight.dtype}")
    if not x.is_contiguous():
        x = x.contiguous()
    y = torch.empty_like(x)
    workspace.library.rms_norm(
        workspace.handle, x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, offset, y.data_ptr()
    )
    return y


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, workspace: Workspace | None = None
) -> torch.Tensor:
    """The same in torch, in the dtype of x."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)
