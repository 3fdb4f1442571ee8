"""RMS norm against float64, at every tail length."""

from __future__ import annotations

import pytest
import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.rms_norm import rms_norm, rms_norm_reference

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 576, 577])
@pytest.mark.parametrize("rows", [0, 1, 13, 300])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_float64(workspace: Workspace, rows: int, width: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(rows + width)
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
    found = rms_norm(x, weight, 1e-5, offset=offset, workspace=workspace)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5, offset=offset).float()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_epsilon_counts_and_zero_rows_stay_zero(workspace: Workspace) -> None:
    x = torch.stack([torch.zeros(20), torch.full((20,), 1e-3)])
    found = rms_norm(x, torch.ones(20), 1e-6, workspace=workspace)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], torch.full((20,), 0.5**0.5))


def test_broken_row_spoils_no_other(workspace: Workspace) -> None:
    x = torch.ones(300, 300)
    x[7, 299] = torch.nan
    found = rms_norm(x, torch.ones(300), 1e-6, workspace=workspace)
    assert found[7].isnan().all()
    assert found.isnan().sum() == 300


def test_row_does_not_depend_on_its_neighbours(workspace: Workspace) -> None:
    x, weight = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)), torch.ones(300)
    together = rms_norm(x, weight, 1e-6, workspace=workspace)
    assert torch.equal(together[[3]], rms_norm(x[[3]], weight, 1e-6, workspace=workspace))


def test_strided_input_keeps_its_shape(workspace: Workspace) -> None:
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    found = rms_norm(x, torch.ones(32), 1e-6, workspace=workspace)
    torch.testing.assert_close(found, rms_norm_reference(x, torch.ones(32), 1e-6))


@pytest.mark.parametrize("bad", [torch.ones(3, 5), torch.ones(3, 4).half(), torch.tensor(1.0)])
def test_unfit_input_is_refused(workspace: Workspace, bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"x must be float32 \(\.\.\., 4\), found"):
        rms_norm(bad, torch.ones(4), 1e-6, workspace=workspace)
