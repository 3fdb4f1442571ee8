"""A vendor's package in small: two ops of a chip of its own, written in torch where the vendor's language would be."""

from __future__ import annotations

import torch
from mxn_kernels.select import Implementation, Registry
from mxn_kernels.target import Target

TOY = Target(name="toy-1", vendor="toy", warp_size=1, num_multiprocessors=4, shared_memory_bytes=1 << 16)


def register(registry: Registry) -> None:
    """What the entry point `mxn.kernels` names."""
    for op in ("silu_mul", "rms_norm"):
        registry.register(Implementation(op=op, name="toy", load=f"{__name__}:{op}", targets=("toy-*",)))


def silu_mul(gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor, target: Target) -> None:
    out.copy_(gate.float() * torch.sigmoid(gate.float()) * up.float())


def rms_norm(x, weight, eps, *, offset, residual, out, total, target) -> None:
    if residual is not None:
        x = x + residual
        total.copy_(x)
    out.copy_(torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float() + offset, eps))
