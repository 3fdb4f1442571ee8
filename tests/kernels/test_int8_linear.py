"""int8 linear: equal sums to the reference, close to float64, and rows that do not know of each other."""

from __future__ import annotations

import time

import pytest
import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.int8_linear import MAX_INPUTS, int8_linear, int8_linear_reference, pack_int8

pytestmark = pytest.mark.torch

SHAPES = [(1, 1), (1, 100), (31, 3), (32, 32), (33, 31), (77, 100), (192, 576), (576, 1536), (100, 577)]
TURNS = [(1, 576, 576), (40, 300, 576), (2, 32, 33), (9, 2000, 64), (1, 1000, 1000)]
ROWS = [0, 1, 2, 3, 7, 13, 32, 47, 48, 130, 700]


def made(rows: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + n * 31 + k)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((rows, k), (n, k), (n,)))


@pytest.mark.parametrize(("n", "k"), SHAPES, ids=lambda value: str(value))
@pytest.mark.parametrize("rows", ROWS)
def test_equals_the_reference(workspace: Workspace, rows: int, n: int, k: int) -> None:
    x, w, b = made(rows, n, k)
    packed = pack_int8(w, b, workspace=workspace)
    found = int8_linear(x, packed, workspace=workspace)
    assert found.shape == (rows, n)
    # Sums are equal integers; what is left is one rounding of the scaled sum, relative to the largest term.
    torch.testing.assert_close(found, int8_linear_reference(x, packed), rtol=1e-6, atol=2e-5)


def test_is_within_int8_error_of_float64(workspace: Workspace) -> None:
    x, w, b = made(64, 300, 576)
    found = int8_linear(x, pack_int8(w, b, workspace=workspace), workspace=workspace).double()
    exact = x.double() @ w.double().T + b.double()
    # Steps of peak/127 on both sides with peaks near 3.5 sigma: 0.8 % each.
    assert (found - exact).norm() / exact.norm() < 0.015


def test_layout_does_not_depend_on_the_instruction_set(workspace: Workspace) -> None:
    _, w, b = made(1, 50, 70)
    packed = pack_int8(w, b, workspace=workspace)
    scale = w.abs().amax(1, keepdim=True) / 127
    assert torch.equal(
        (packed.dequantise() / scale).round(), (w * (torch.full_like(scale, 127) / (scale * 127))).round()
    )


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 48, 200])
def test_row_does_not_depend_on_its_neighbours(workspace: Workspace, rows: int) -> None:
    x, w, b = made(rows, 200, 300)
    packed = pack_int8(w, b, workspace=workspace)
    together = int8_linear(x, packed, workspace=workspace)
    alone = torch.cat([int8_linear(row[None], packed, workspace=workspace) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_threads(workspace: Workspace, threads: int) -> None:
    x, w, b = made(30, 1000, 300)
    packed = pack_int8(w, b, workspace=workspace)
    other = Workspace(threads, workspace.library.isa)
    assert torch.equal(int8_linear(x, packed, workspace=other), int8_linear(x, packed, workspace=workspace))


def test_calls_in_quick_turns_do_not_mix(workspace: Workspace) -> None:
    """Small and large products, with and without pauses that let the team fall asleep, on more threads than cores."""
    team, alone = Workspace(5, workspace.library.isa), Workspace(1, workspace.library.isa)
    layers = [(made(rows, n, k)[0], pack_int8(made(1, n, k)[1], workspace=team)) for rows, n, k in TURNS]
    expected = [int8_linear(x, packed, workspace=alone) for x, packed in layers]
    for turn in range(60):
        for (x, packed), answer in zip(layers, expected, strict=True):
            assert torch.equal(int8_linear(x, packed, workspace=team), answer)
        if turn % 20 == 0:
            time.sleep(0.002)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 299])
@pytest.mark.parametrize("rows", [1, 6, 60])
def test_broken_row_becomes_nan_and_spoils_no_other(
    workspace: Workspace, rows: int, column: int, broken: float
) -> None:
    x, w, b = made(rows, 64, 300)
    packed = pack_int8(w, b, workspace=workspace)
    expected = int8_linear(x, packed, workspace=workspace)
    x[rows // 2, column] = broken
    found = int8_linear(x, packed, workspace=workspace)
    assert found[rows // 2].isnan().all()
    others = torch.arange(rows) != rows // 2
    assert torch.equal(found[others], expected[others])


def test_zero_and_tiny_rows_give_the_bias(workspace: Workspace) -> None:
    _, w, b = made(1, 40, 50)
    packed = pack_int8(w, b, workspace=workspace)
    x = torch.stack([torch.zeros(50), torch.full((50,), 1e-40), torch.full((50,), -1e-36)])
    assert torch.equal(int8_linear(x, packed, workspace=workspace), b.expand(3, -1))


def test_largest_activations_do_not_overflow(workspace: Workspace) -> None:
    k = MAX_INPUTS
    packed = pack_int8(torch.ones(2, k) * torch.tensor([[1.0], [-1.0]]), workspace=workspace)
    found = int8_linear(torch.full((1, k), 3.0), packed, workspace=workspace)
    torch.testing.assert_close(found, torch.tensor([[3.0 * k, -3.0 * k]]), rtol=1e-6, atol=0)


def test_leading_dimensions_and_strides_are_kept(workspace: Workspace) -> None:
    _, w, b = made(1, 40, 60)
    packed = pack_int8(w, b, workspace=workspace)
    x = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    found = int8_linear(x, packed, workspace=workspace)
    assert found.shape == (2, 3, 40)
    assert torch.equal(found.reshape(6, 40), int8_linear(x.reshape(6, 60), packed, workspace=workspace))


def test_packing_takes_any_float_type_and_stride(workspace: Workspace) -> None:
    _, w, _ = made(1, 40, 60)
    w = w.bfloat16()
    straight = pack_int8(w.float(), workspace=workspace)
    turned = pack_int8(w.T.contiguous().T, workspace=workspace)
    assert torch.equal(straight.panels, turned.panels)
    assert torch.equal(straight.scales, turned.scales)


def test_large_matrix_is_packed_in_slices(workspace: Workspace) -> None:
    _, w, _ = made(1, 5000, 1000)
    scale = w.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(
        pack_int8(w, workspace=workspace).dequantise(), w, rtol=0, atol=float(scale.max()) * 0.51
    )


def test_writes_nothing_outside_its_result(workspace: Workspace) -> None:
    """y lies between guards; the wrapper allocates y, so the entry point is called as the wrapper calls it."""
    x, w, b = made(5, 45, 33)
    packed = pack_int8(w, b, workspace=workspace)
    held = torch.full((5 * 45 + 64,), 7.0)
    y = held[32:-32]
    workspace.library.linear(workspace.handle, packed.address, x.data_ptr(), 5, y.data_ptr())
    assert torch.equal(y.view(5, 45), int8_linear(x, packed, workspace=workspace))
    assert (held[:32] == 7).all()
    assert (held[-32:] == 7).all()


def test_reads_nothing_outside_its_input(workspace: Workspace) -> None:
    x, w, b = made(3, 45, 33)
    packed = pack_int8(w, b, workspace=workspace)
    held = torch.full((3 * 33 + 64,), torch.nan)
    held[32:-32] = x.flatten()
    assert torch.equal(
        int8_linear(held[32:-32].view(3, 33), packed, workspace=workspace), int8_linear(x, packed, workspace=workspace)
    )


@pytest.mark.parametrize("bad", [torch.zeros(3, 61), torch.zeros(3, 60, dtype=torch.float64), torch.tensor(1.0)])
def test_unfit_input_is_refused(workspace: Workspace, bad: torch.Tensor) -> None:
    packed = pack_int8(torch.ones(4, 60), workspace=workspace)
    with pytest.raises(ValueError, match=r"x must be float32 \(\.\.\., 60\), found"):
        int8_linear(bad, packed, workspace=workspace)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(4), None, "must be a floating-point matrix"),
        (torch.ones(4, 4, dtype=torch.int8), None, "must be a floating-point matrix"),
        (torch.ones(0, 4), None, "n >= 1"),
        (torch.ones(1, MAX_INPUTS + 1), None, f"k <= {MAX_INPUTS}"),
        (torch.ones(4, 4), torch.ones(5), r"bias must have shape \(4,\), found \(5,\)"),
        (torch.ones(4, 4), torch.tensor([0, 0, torch.inf, 0]), "bias holds NaN or infinity"),
    ],
)
def test_unfit_weight_is_refused(
    workspace: Workspace, weight: torch.Tensor, bias: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack_int8(weight, bias, workspace=workspace)


@pytest.mark.parametrize("row", [0, 33, 4999])
def test_first_broken_row_of_a_weight_is_named(workspace: Workspace, row: int) -> None:
    weight = torch.ones(5000, 900)
    weight[row, 5] = torch.nan
    weight[4999, 7] = torch.inf
    with pytest.raises(ValueError, match=f"NaN or infinity in row {row}$"):
        pack_int8(weight, workspace=workspace)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_thread_count_outside_reason_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="threads must be between 1 and 1024"):
        Workspace(threads)
