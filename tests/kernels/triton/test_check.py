"""The check that needs no test runner: it passes where kernels are right, and says so where one is wrong."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton kernels need triton")

from mxn_kernels import ops
from mxn_kernels.testing import check


@pytest.mark.parametrize(
    "only", ["silu_mul float32", "move_blocks", "groups filled in later", "write_kv e4m3fn tensor"]
)
def test_right_kernels_pass(only: str, device: str) -> None:
    (result,) = check.run_checks(device, only)
    assert result.state == "ok"
    assert result.found <= 1


def test_wrong_and_failing_kernels_are_named(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    right = ops.silu_mul

    def wrong(gate: torch.Tensor, up: torch.Tensor, **options: object) -> torch.Tensor:
        return right(gate, up, **options) * (1.0 if options else 1.1)

    monkeypatch.setattr(ops, "silu_mul", wrong)
    (result,) = check.run_checks(device, "silu_mul float32")
    assert result.state.startswith("wrong: ")

    def fails(*arguments: object, **options: object) -> torch.Tensor:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(ops, "silu_mul", fails)
    assert [r.state for r in check.run_checks(device, "silu_mul float32")] == [
        "failed: RuntimeError: illegal memory access"
    ]
