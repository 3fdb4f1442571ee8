"""y = x W^T + bias in 8 bits: one scale per output channel, one per row of x, sums exact in int32."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch

from mxn_kernels.cpu.library import Workspace, aligned_empty
from mxn_kernels.packed_linear import (
    FORMATS,
    GROUP,
    MAX_INPUTS,
    PANEL,
    SMALLEST,
    WeightStruct,
    check_channels,
    check_matrix,
    packed_linear,
    padded_bias,
    round_up,
    rounded_rows,
)

__all__ = ["MAX_INPUTS", "Int8Weight", "int8_linear", "int8_linear_reference", "pack_int8"]


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight matrix [n, k] in panels of 32 channels, [n / 32][k / 4][32][4], stored as value + 128.

    panels: uint8; scales, bias: float32, padded to whole panels. The layout is the same for every instruction set.
    """

    format: ClassVar[str] = "int8"

    panels: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor
    n: int
    k: int

    def __post_init__(self) -> None:
        pointers = (self.panels.data_ptr(), self.scales.data_ptr(), self.bias.data_ptr())
        object.__setattr__(self, "struct", WeightStruct(*pointers, self.n, self.k, FORMATS[self.format]))
        object.__setattr__(self, "address", ctypes.addressof(self.struct))

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.panels, self.scales, self.bias))

    def channels(self, first: int, last: int) -> Int8Weight:
        """Output channels [first, last) over the same memory. Raises: ValueError unless `first` begins a panel."""
        end = check_channels(first, last, self.n)
        depth = round_up(self.k, GROUP)
        panels = self.panels[first * depth : end * depth]
        return Int8Weight(panels, self.scales[first:end], self.bias[first:end], last - first, self.k)

    def dequantise(self) -> torch.Tensor:
        """[n, k] float32."""
        depth = round_up(self.k, GROUP)
        values = self.panels.view(-1, depth // 4, PANEL, 4).permute(0, 2, 1, 3).reshape(-1, depth)
        return (values[: self.n, : self.k].float() - 128) * self.scales[: self.n, None]


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None = None, *, workspace: Workspace) -> Int8Weight:
    """Quantises a float matrix [n, k] of any strides; extra memory stays at a few thousand rows.

    Raises: ValueError on a shape or type that does not fit, or on the first row that holds NaN or infinity.
    """
    check_matrix(weight, bias)
    n, k = weight.shape
    depth, padded = round_up(k, GROUP), round_up(n, PANEL)
    panels = aligned_empty(padded * depth)
    scales = torch.empty(padded)
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
    return Int8Weight(panels, scales, padded_bias(bias, n), n, k)


def int8_linear(x: torch.Tensor, weight: Int8Weight, *, workspace: Workspace) -> torch.Tensor:
    """Args: x (..., k) float32. Returns: (..., n) float32. See `packed_linear`."""
    return packed_linear(x, weight, workspace=workspace)


def int8_linear_reference(x: torch.Tensor, weight: Int8Weight, *, workspace: Workspace | None = None) -> torch.Tensor:
    """The same arithmetic in torch: equal sums, so results differ only by the rounding of the last multiply-add."""
    values, scale = rounded_rows(x)
    whole = (weight.dequantise() / weight.scales[: weight.n, None].clamp(min=SMALLEST)).round().double()
    sums = (values @ whole.T).float()
    return sums * scale * weight.scales[: weight.n] + weight.bias[: weight.n]
