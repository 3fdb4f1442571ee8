"""The gate of a gated MLP: silu(gate) * up."""

from __future__ import annotations

import torch

from mxn_kernels.ops.checks import check_rows, need, target_of
from mxn_kernels.select import select
from mxn_kernels.target import Target


def silu_mul(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    implementation: str | None = None,
    target: Target | None = None,
) -> torch.Tensor:
    """gate / (1 + exp(-gate)) * up, computed in fp32.

    Args: gate, up (rows, n) of one dtype, each contiguous in its last dimension: halves of one projection will do.
    Returns: (rows, n), contiguous, in their dtype.
    Raises: ValueError on arguments that do not fit; KernelUnavailable if nothing computes it on this chip.
    """
    check_rows("gate", gate, (None, None))
    check_rows("up", up, tuple(gate.shape), (gate.dtype,))
    need(gate.device == up.device, f"gate is on {gate.device}, up on {up.device}")
    target = target_of(gate, target, gate.dtype)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    select("silu_mul", target, implementation)(gate, up, out=out, target=target)
    return out


def silu_mul_reference(
    gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor, target: Target | None = None
) -> None:
    """The same in torch, in float64."""
    out.copy_(torch.nn.functional.silu(gate.double()) * up.double())
