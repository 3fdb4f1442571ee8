"""y = x W^T + bias over packed weights of any format: what `int8_linear` and `group_linear` have in common.

Activations are rounded to 8 bits by one scale per row. Sums are exact in int32: of a whole row (int8) or of a group of
inputs (the others).
"""

from __future__ import annotations

import ctypes
from typing import ClassVar, Protocol

import torch

from mxn_kernels.cpu.library import Workspace

PANEL = 32
"""Output channels that are stored together."""
GROUP = 32
"""Inputs are padded to a multiple of this; in grouped formats as many share a scale."""
MAX_INPUTS = 131072
"""127 * 127 * this fits int32, so no sum can overflow."""
SMALLEST = 1e-30
"""A row or group whose largest value is smaller counts as zero."""

FORMATS = {"int8": 0, "q8_0": 1, "q4_0": 2, "q4_1": 3}


class WeightStruct(ctypes.Structure):
    """PackedWeight of gemm.h."""

    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("format", ctypes.c_int32),
    ]


class PackedWeight(Protocol):
    """A weight matrix [n, k] as the kernels read it: `Int8Weight` or `GroupWeight`. address: of its WeightStruct."""

    format: ClassVar[str] | str
    n: int
    k: int
    address: int

    @property
    def num_bytes(self) -> int: ...

    def channels(self, first: int, last: int) -> PackedWeight: ...

    def dequantise(self) -> torch.Tensor: ...


def packed_linear(x: torch.Tensor, weight: PackedWeight, *, workspace: Workspace) -> torch.Tensor:
    """Args: x (..., k) float32. Returns: (..., n) float32.

    A row's result depends on that row alone, bit for bit. A row that holds NaN or infinity gives a row of NaN.
    Raises: ValueError if x does not fit the weight.
    """
    shape = x.shape
    if x.dtype is not torch.float32 or not shape or shape[-1] != weight.k:
        raise ValueError(f"x must be float32 (..., {weight.k}), found {x.dtype} {tuple(shape)}")
    if not x.is_contiguous():
        x = x.contiguous()
    y = torch.empty((*shape[:-1], weight.n))
    failed = workspace.library.linear(
        workspace.handle, weight.address, x.data_ptr(), x.numel() // weight.k, y.data_ptr()
    )
    if failed:
        raise MemoryError(f"no memory to quantise {x.numel()} activations")
    return y


def rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as the kernels round them, in torch: whole numbers (..., k) in float64 and scales (..., 1)."""
    peak = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak < SMALLEST, 0.0, torch.full_like(peak, 127) / peak)  # 127 / peak would round twice
    values = (x * inverse).round().double()
    scale = torch.where(peak < SMALLEST, 0.0, peak / 127)
    scale = torch.where(torch.isfinite(peak), scale, torch.nan)
    return torch.where(torch.isfinite(peak), values, 0.0), scale


def check_matrix(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises: ValueError unless weight is a float matrix [n, k] of a size the kernels take and bias finite (n,)."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix [n, k], found {weight.dtype} {tuple(weight.shape)}")
    check_sizes(*weight.shape, bias)


def check_sizes(n: int, k: int, bias: torch.Tensor | None) -> None:
    """Raises: ValueError on sizes the kernels do not take, or a bias that is not finite (n,)."""
    if n < 1 or not 1 <= k <= MAX_INPUTS:
        raise ValueError(f"weight must have n >= 1 and 1 <= k <= {MAX_INPUTS}, found {n} x {k}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must have shape ({n},), found {tuple(bias.shape)}")
    if bias is not None and not torch.isfinite(bias).all():
        raise ValueError("bias holds NaN or infinity")


def check_channels(first: int, last: int, n: int) -> int:
    """Where the panels of channels [first, last) of n end. Raises: ValueError unless they are whole panels."""
    if first % PANEL or not 0 <= first < last <= n:
        raise ValueError(f"channels must begin at a multiple of {PANEL} and lie in {n}, found {first} to {last}")
    if last % PANEL and last != n:
        raise ValueError(f"channels must end with a panel of {PANEL}, found {last} of {n}")
    return round_up(last, PANEL)


def padded_bias(bias: torch.Tensor | None, n: int) -> torch.Tensor:
    """float32, zeros up to whole panels."""
    padded = torch.zeros(round_up(n, PANEL))
    if bias is not None:
        padded[:n] = bias
    return padded


def round_up(value: int, to: int) -> int:
    return (value + to - 1) // to * to
