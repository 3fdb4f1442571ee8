"""y = x W^T + bias with weights of 4 or 8 bits and a scale per output channel and 32 inputs.

The formats are those of GGUF files, value for value, so a file's blocks are taken over without a second rounding:

| format | value | bits a weight |
|---|---|---|
| q4_0 | scale * (q - 8), q from 0 to 15 | 4.5 |
| q4_1 | scale * q + minimum, q from 0 to 15 | 5 |
| q8_0 | scale * q, q from -128 to 127 | 8.5 |

A decode step of a few rows is limited by the bytes of the weights, of which these have fewer than int8; large batches
are limited by arithmetic, where scaling every group costs more than one scale per channel.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch

from mxn_kernels.cpu.library import Workspace, aligned_empty
from mxn_kernels.packed_linear import (
    FORMATS,
    GROUP,
    PANEL,
    WeightStruct,
    check_channels,
    check_matrix,
    check_sizes,
    packed_linear,
    padded_bias,
    round_up,
    rounded_rows,
)

GroupFormat = Literal["q4_0", "q4_1", "q8_0"]
BLOCK_BYTES: dict[GroupFormat, int] = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
"""Bytes of one GGUF block: 32 weights of one channel."""


@dataclass(frozen=True, eq=False)
class GroupWeight:
    """A weight matrix [n, k] in panels of 32 channels, group by group: values, scales, minimums; see gemm.h.

    panels: uint8; bias: float32, padded to whole panels. The layout is the same for every instruction set.
    """

    format: GroupFormat
    panels: torch.Tensor
    bias: torch.Tensor
    n: int
    k: int

    def __post_init__(self) -> None:
        struct = WeightStruct(self.panels.data_ptr(), None, self.bias.data_ptr(), self.n, self.k, FORMATS[self.format])
        object.__setattr__(self, "struct", struct)
        object.__setattr__(self, "address", ctypes.addressof(struct))

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.panels, self.bias))

    def channels(self, first: int, last: int) -> GroupWeight:
        """Output channels [first, last) over the same memory. Raises: ValueError unless `first` begins a panel."""
        end = check_channels(first, last, self.n)
        row_bytes = round_up(self.k, GROUP) // GROUP * BLOCK_BYTES[self.format]
        panels = self.panels[first * row_bytes : end * row_bytes]
        return GroupWeight(self.format, panels, self.bias[first:end], last - first, self.k)

    def dequantise(self) -> torch.Tensor:
        """[n, k] float32: exactly the values that are meant."""
        codes, scales, minimums = self._parts()
        offset = {"q4_0": 8, "q4_1": 0, "q8_0": 128}[self.format]
        values = (codes.float() - offset) * scales.float()[..., None]
        if minimums is not None:
            values += minimums.float()[..., None]
        return values.reshape(len(values), -1)[: self.n, : self.k]

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes (channels, groups, 32) uint8; scales and minimums (channels, groups) float16; channels as padded."""
        groups = round_up(self.k, GROUP) // GROUP
        panels = self.panels.view(-1, groups, BLOCK_BYTES[self.format] * PANEL)
        value_bytes = PANEL * (GROUP if self.format == "q8_0" else GROUP // 2)
        stored = panels[..., :value_bytes].view(len(panels), groups, -1, PANEL, 4).permute(0, 3, 1, 2, 4).flatten(3)
        codes = stored if self.format == "q8_0" else torch.cat([stored & 15, stored >> 4], -1)
        halves = panels[..., value_bytes:].contiguous().view(torch.float16).transpose(1, 2)
        scales, minimums = halves[:, :PANEL].flatten(0, 1), halves[:, PANEL:].flatten(0, 1)
        return codes.flatten(0, 1), scales, minimums if self.format == "q4_1" else None


def pack_groups(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, format: GroupFormat = "q4_0", workspace: Workspace
) -> GroupWeight:
    """Quantises a float matrix [n, k] of any strides: per group the scale (and minimum) that fits best of 19 tried.

    Raises: ValueError on a shape or type that does not fit, or on the first row that holds NaN, infinity, or values
      whose scale is too large for half precision.
    """
    check_matrix(weight, bias)
    n, k = weight.shape
    row_bytes = _row_bytes(format, k)
    panels = aligned_empty(round_up(n, PANEL) * row_bytes)
    step = max(PANEL, (1 << 22) // k // PANEL * PANEL)
    for start in range(0, n, step):
        rows = weight.detach()[start : start + step].float().contiguous()
        to = panels.data_ptr() + start * row_bytes
        bad = workspace.library.pack_groups(workspace.handle, rows.data_ptr(), len(rows), k, FORMATS[format], to)
        if bad >= 0:
            raise ValueError(f"weight holds NaN, infinity or too large a value in row {start + bad}")
    return GroupWeight(format, panels, padded_bias(bias, n), n, k)


def pack_blocks(
    blocks: torch.Tensor,
    n: int,
    k: int,
    bias: torch.Tensor | None = None,
    *,
    format: GroupFormat,
    workspace: Workspace,
) -> GroupWeight:
    """Takes over a GGUF tensor's blocks as they are.

    Args: blocks: uint8, any shape, n rows of k / 32 blocks each in the file's order; not needed afterwards.
    Raises: ValueError on a size that does not fit, or on the first row with a scale that is NaN or infinity.
    """
    check_sizes(n, k, bias)
    row_bytes = _row_bytes(format, k)
    if k % GROUP:
        raise ValueError(f"a row of blocks must have a multiple of {GROUP} weights, found {k}")
    if blocks.dtype is not torch.uint8 or blocks.numel() != n * row_bytes:
        found = f"{blocks.dtype} of {blocks.numel()}"
        raise ValueError(f"blocks of {n} x {k} weights in {format} must be {n * row_bytes} bytes, found {found}")
    blocks = blocks.contiguous()
    panels = aligned_empty(round_up(n, PANEL) * row_bytes)
    bad = workspace.library.take_blocks(workspace.handle, blocks.data_ptr(), n, k, FORMATS[format], panels.data_ptr())
    if bad >= 0:
        raise ValueError(f"blocks hold a scale that is NaN or infinity in row {bad}")
    return GroupWeight(format, panels, padded_bias(bias, n), n, k)


def group_linear(x: torch.Tensor, weight: GroupWeight, *, workspace: Workspace) -> torch.Tensor:
    """Args: x (..., k) float32. Returns: (..., n) float32. See `packed_linear`."""
    return packed_linear(x, weight, workspace=workspace)


def group_linear_reference(x: torch.Tensor, weight: GroupWeight, *, workspace: Workspace | None = None) -> torch.Tensor:
    """The same in torch: activations rounded alike, sums in float64."""
    values, scale = rounded_rows(x)
    sums = values @ weight.dequantise().double().T
    return (sums * scale + weight.bias[: weight.n]).float()


def _row_bytes(format: GroupFormat, k: int) -> int:
    if format not in BLOCK_BYTES:
        raise ValueError(f"format must be one of {', '.join(BLOCK_BYTES)}, found {format}")
    return round_up(k, GROUP) // GROUP * BLOCK_BYTES[format]
