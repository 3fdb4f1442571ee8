"""Grouped formats: GGUF blocks taken over exactly, products close to float64, rows that do not know of each other."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.group_linear import (
    BLOCK_BYTES,
    GroupFormat,
    GroupWeight,
    group_linear,
    group_linear_reference,
    pack_blocks,
    pack_groups,
)

pytestmark = pytest.mark.torch

FORMATS = get_args(GroupFormat)
SHAPES = [(1, 1), (31, 3), (32, 32), (33, 31), (77, 100), (192, 576), (100, 577)]
ROWS = [0, 1, 2, 3, 5, 7, 13, 48, 130]


def made(rows: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + n * 31 + k)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((rows, k), (n, k), (n,)))


def random_blocks(n: int, k: int, format: GroupFormat) -> torch.Tensor:
    """Every code occurs, the extremes too; scales of both signs."""
    generator = torch.Generator().manual_seed(n + k)
    blocks = torch.randint(0, 256, (n, k // 32, BLOCK_BYTES[format]), dtype=torch.uint8, generator=generator)
    halves = 2 if format == "q4_1" else 1
    scales = (torch.randn(n, k // 32, halves, generator=generator) * 0.01).half()
    blocks[..., : 2 * halves] = scales.view(torch.uint8)
    return blocks


def values_of(blocks: torch.Tensor, format: GroupFormat) -> torch.Tensor:
    """GGUF's definition of the formats, in torch."""
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    if format == "q8_0":
        return (blocks[..., 2:].view(torch.int8).float() * scale).flatten(1)
    codes = blocks[..., -16:]
    codes = torch.cat([codes & 15, codes >> 4], -1).float()
    if format == "q4_0":
        return ((codes - 8) * scale).flatten(1)
    return (codes * scale + blocks[..., 2:4].contiguous().view(torch.float16).float()).flatten(1)


def assert_equals_reference(found: torch.Tensor, x: torch.Tensor, packed: GroupWeight) -> None:
    expected = group_linear_reference(x, packed)
    # Groups are exact; a row adds up to 20 of them in float32, each of a size that sums of |x| |w| bound.
    bound = x.abs() @ packed.dequantise().abs().T + packed.bias[: packed.n].abs()
    assert ((found - expected).abs() <= 2e-6 * bound + 1e-6).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=lambda value: str(value))
def test_equals_the_reference(workspace: Workspace, n: int, k: int, format: GroupFormat) -> None:
    for rows in ROWS:
        x, w, b = made(rows, n, k)
        packed = pack_groups(w, b, format=format, workspace=workspace)
        found = group_linear(x, packed, workspace=workspace)
        assert found.shape == (rows, n)
        assert_equals_reference(found, x, packed)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (45, 96), (64, 576)])
def test_gguf_blocks_are_taken_over_without_a_second_rounding(
    workspace: Workspace, n: int, k: int, format: GroupFormat
) -> None:
    blocks = random_blocks(n, k, format)
    packed = pack_blocks(blocks, n, k, format=format, workspace=workspace)
    assert torch.equal(packed.dequantise(), values_of(blocks, format))
    for rows in (1, 2, 9):
        x = made(rows, n, k)[0]
        assert_equals_reference(group_linear(x, packed, workspace=workspace), x, packed)


@pytest.mark.parametrize("format", FORMATS)
def test_packing_values_that_are_on_the_grid_changes_nothing(workspace: Workspace, format: GroupFormat) -> None:
    """A checkpoint that was once in this format comes back as it was, up to the last bits of a half-precision scale."""
    scale = 2.0**-7  # exact in half precision
    generator = torch.Generator().manual_seed(0)
    low, high = {"q4_0": (-8, 8), "q4_1": (0, 16), "q8_0": (-127, 128)}[format]
    codes = torch.randint(low, high, (40, 4, 32), generator=generator)
    codes[..., 0], codes[..., 1] = low, high - 1
    w = (codes * scale).flatten(1) + (0.125 if format == "q4_1" else 0.0)
    torch.testing.assert_close(pack_groups(w, format=format, workspace=workspace).dequantise(), w, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("format", "limit"), [("q4_0", 0.1), ("q4_1", 0.1), ("q8_0", 0.008)])
def test_error_of_weights_that_were_never_quantised(workspace: Workspace, format: GroupFormat, limit: float) -> None:
    """Normal values, each channel of its own size, one in 500 six times as large: like trained layers, on no grid."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(256, 1024, generator=generator) * torch.rand(256, 1, generator=generator)
    w[torch.rand(w.shape, generator=generator) < 0.002] *= 6
    found = pack_groups(w, format=format, workspace=workspace).dequantise()
    error = (found - w).norm() / w.norm()
    assert error < limit
    widest = w.view(256, 32, 32).abs().amax(-1, keepdim=True)
    plain = ((w.view(256, 32, 32) / widest * 7).round() * widest / 7).view(w.shape)
    assert format == "q8_0" or error < 0.95 * (plain - w).norm() / w.norm()  # better than rounding to +-7


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 48, 200])
def test_row_does_not_depend_on_its_neighbours_or_on_threads(
    workspace: Workspace, rows: int, format: GroupFormat
) -> None:
    x, w, b = made(rows, 200, 300)
    packed = pack_groups(w, b, format=format, workspace=workspace)
    together = group_linear(x, packed, workspace=workspace)
    alone = torch.cat([group_linear(row[None], packed, workspace=workspace) for row in x])
    assert torch.equal(together, alone)
    assert torch.equal(group_linear(x, packed, workspace=Workspace(1, workspace.library.isa)), together)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_row_becomes_nan_and_spoils_no_other(workspace: Workspace, broken: float, format: GroupFormat) -> None:
    for rows in (1, 6, 60):
        x, w, b = made(rows, 64, 300)
        packed = pack_groups(w, b, format=format, workspace=workspace)
        expected = group_linear(x, packed, workspace=workspace)
        x[rows // 2, 299] = broken
        found = group_linear(x, packed, workspace=workspace)
        assert found[rows // 2].isnan().all()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("format", FORMATS)
def test_zero_rows_and_zero_groups(workspace: Workspace, format: GroupFormat) -> None:
    x, w, b = made(2, 40, 96)
    w[:, 32:64] = 0
    packed = pack_groups(w, b, format=format, workspace=workspace)
    assert (packed.dequantise()[:, 32:64] == 0).all()
    assert torch.equal(group_linear(torch.zeros(2, 96), packed, workspace=workspace), b.expand(2, -1))
    assert_equals_reference(group_linear(x, packed, workspace=workspace), x, packed)


@pytest.mark.parametrize("format", FORMATS)
def test_channels_share_memory(workspace: Workspace, format: GroupFormat) -> None:
    x, w, b = made(3, 100, 70)
    packed = pack_groups(w, b, format=format, workspace=workspace)
    whole = group_linear(x, packed, workspace=workspace)
    assert torch.equal(group_linear(x, packed.channels(32, 64), workspace=workspace), whole[:, 32:64])
    assert torch.equal(group_linear(x, packed.channels(64, 100), workspace=workspace), whole[:, 64:])
    with pytest.raises(ValueError, match="channels must begin"):
        packed.channels(16, 64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("row", [0, 4999])
def test_first_row_that_cannot_be_packed_is_named(workspace: Workspace, row: int, bad: float) -> None:
    weight = torch.ones(5000, 900)
    weight[row, 5] = bad
    with pytest.raises(ValueError, match=f"too large a value in row {row}$"):
        pack_groups(weight, workspace=workspace)


def test_unfit_blocks_are_refused(workspace: Workspace) -> None:
    blocks = random_blocks(4, 64, "q4_0")
    with pytest.raises(ValueError, match=r"must be 180 bytes, found torch\.uint8 of 144"):
        pack_blocks(blocks, 5, 64, format="q4_0", workspace=workspace)
    with pytest.raises(ValueError, match="multiple of 32 weights, found 63"):
        pack_blocks(blocks, 4, 63, format="q4_0", workspace=workspace)
    with pytest.raises(ValueError, match="one of q4_0, q4_1, q8_0, found q5_0"):
        pack_blocks(blocks, 4, 64, format="q5_0", workspace=workspace)
    blocks[3, 1, :2] = torch.tensor([torch.inf]).half().view(torch.uint8)
    with pytest.raises(ValueError, match=r"NaN or infinity in row 3$"):
        pack_blocks(blocks, 4, 64, format="q4_0", workspace=workspace)
