"""y = x W^T + bias in 8 bits: one scale per output channel, one per row of x, sums exact in int32."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from mxn_kernels.cpu.library import Workspace, aligned_empty

PANEL = 32
DEPTH_STEP = 16
MAX_INPUTS = 131072
"""127 * 127 * this fits int32, so no sum can overflow."""

_SMALLEST = 1e-30


class _Struct(ctypes.Structure):
    _fields_ = [
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight matrix [n, k] in panels of 32 channels, [n / 32][k / 4][32][4], stored as value + 128.

    panels: uint8; scales, bias: float32, padded to whole panels. The layout is the same for every instruction set.
    """

    panels: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor
    n: int
    k: int

    def __post_init__(self) -> None:
        pointers = (self.panels.data_ptr(), self.scales.data_ptr(), self.bias.data_ptr())
        object.__setattr__(self, "struct", _Struct(*pointers, self.n, self.k))
        object.__setattr__(self, "address", ctypes.addressof(self.struct))

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.panels, self.scales, self.bias))

    def channels(self, first: int, last: int) -> Int8Weight:
        """Output channels [first, last) over the same memory. Raises: ValueError unless `first` begins a panel."""
        if first % PANEL or not 0 <= first < last <= self.n:
            raise ValueError(
                f"channels must begin at a multiple of {PANEL} and lie in {self.n}, found {first} to {last}"
            )
        end = _round_up(last, PANEL)
        if last % PANEL and last != self.n:
            raise ValueError(f"channels must end with a panel of {PANEL}, found {last} of {self.n}")
        depth = self.panels.numel() // self.scales.numel()
        panels = self.panels[first * depth : end * depth]
        return Int8Weight(panels, self.scales[first:end], self.bias[first:end], last - first, self.k)

    def dequantise(self) -> torch.Tensor:
        """[n, k] float32."""
        depth = self.panels.numel() // self.scales.numel()
        values = self.panels.view(-1, depth // 4, PANEL, 4).permute(0, 2, 1, 3).reshape(-1, depth)
        return (values[: self.n, : self.k].float() - 128) * self.scales[: self.n, None]


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None = None, *, workspace: Workspace) -> Int8Weight:
    """Quantises a float matrix [n, k] of any strides; extra memory stays at a few thousand rows.

    Raises: ValueError on a shape or type that does not fit, or on the first row that holds NaN or infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix [n, k], found {weight.dtype} {tuple(weight.shape)}")
    n, k = weight.shape
    if n < 1 or not 1 <= k <= MAX_INPUTS:
        raise ValueError(f"weight must have n >= 1 and 1 <= k <= {MAX_INPUTS}, found {n} x {k}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must have shape ({n},), found {tuple(bias.shape)}")
    if bias is not None and not torch.isfinite(bias).all():
        raise ValueError("bias holds NaN or infinity")
    depth, padded = _round_up(k, DEPTH_STEP), _round_up(n, PANEL)
    panels = aligned_empty(padded * depth)
    scales = torch.empty(padded)
    padded_bias = torch.zeros(padded)
    if bias is not None:
        padded_bias[:n] = bias
    step = max(PANEL, (1 << 22) // k // PANEL * PANEL)
    for start in range(0, n, step):
        rows = weight.detach()[start : start + step].float().contiguous()
        bad = workspace.library.pack_int8(
            workspace.handle,
            rows.data_ptr(),
            len(rows),
            k,
            panels.data_ptr() + start * depth,
            scales.data_ptr() + 4 * start,
        )
        if bad >= 0:
            raise ValueError(f"weight holds NaN or infinity in row {start + bad}")
    return Int8Weight(panels, scales, padded_bias, n, k)


def int8_linear(x: torch.Tensor, weight: Int8Weight, *, workspace: Workspace) -> torch.Tensor:
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
    failed = workspace.library.int8_linear(
        workspace.handle, weight.address, x.data_ptr(), x.numel() // weight.k, y.data_ptr()
    )
    if failed:
        raise MemoryError(f"no memory to quantise {x.numel()} activations")
    return y


def int8_linear_reference(x: torch.Tensor, weight: Int8Weight, *, workspace: Workspace | None = None) -> torch.Tensor:
    """The same arithmetic in torch: equal sums, so results differ only by the rounding of the last multiply-add."""
    peak = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak < _SMALLEST, 0.0, torch.full_like(peak, 127) / peak)  # 127 / peak would round twice
    values = (x * inverse).round().double()
    scale = torch.where(peak < _SMALLEST, 0.0, peak / 127)
    scale = torch.where(torch.isfinite(peak), scale, torch.nan)
    values = torch.where(torch.isfinite(peak), values, 0.0)
    whole = (weight.dequantise() / weight.scales[: weight.n, None].clamp(min=_SMALLEST)).round().double()
    sums = (values @ whole.T).float()
    return sums * scale * weight.scales[: weight.n] + weight.bias[: weight.n]


def _round_up(value: int, to: int) -> int:
    return (value + to - 1) // to * to
