"""Replaces parts of a loaded model by one kernel each: RMS norms, and the gate of gated feed-forward blocks.

transformers computes a norm in about six operations and a gate in two products and two operations. Each replacement is
compared with the module it replaces, on random input of the model's own type; what differs stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from mxn_kernels import KernelUnavailable, ops
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the largest output. Both sides round once or twice to the model's type; a wrong replacement is off by 0.1."""

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ROWS = 5


class FusedNorm(nn.Module):
    """RMS norm over the last dimension, times a weight that may be stored less one (Gemma)."""

    def __init__(
        self, weight: torch.Tensor, eps: float, *, offset: float = 0.0, implementation: str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self._options = {"eps": eps, "offset": offset, "implementation": implementation}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        return ops.rms_norm(x, self.weight, **self._options)


class FusedGate(nn.Module):
    """silu(gate(x)) * up(x), then down: gate and up in one product, their combination in one kernel."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, implementation: str | None = None) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.cat([gate.weight, up.weight]), requires_grad=False)
        self.bias = None
        if gate.bias is not None:
            self.bias = nn.Parameter(torch.cat([gate.bias, up.bias]), requires_grad=False)
        self.down_proj = down
        self._width, self._implementation = gate.out_features, implementation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = functional.linear(x, self.both, self.bias).flatten(0, -2)
        product = ops.silu_mul(both[:, : self._width], both[:, self._width :], implementation=self._implementation)
        return self.down_proj(product.view(*x.shape[:-1], self._width))


@torch.inference_mode()
def fuse(model: PreTrainedModel, *, implementation: str | None = None) -> Sequence[str]:
    """Replaces what can be replaced, in place, and answers with notes. Args: implementation: of the ops."""
    done: Counter[str] = Counter()
    kept: dict[str, str] = {}
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            kind = type(module).__name__
            try:
                replacement = _norm(module, implementation) or _gate(module, implementation)
            except (KernelUnavailable, ValueError) as error:
                kept[kind] = str(error)
                continue
            if replacement is None:
                continue
            error = _difference(module, replacement)
            if error > 1:
                kept[kind] = f"differs from its replacement by {error:.2g} of what is allowed"
                continue
            setattr(parent, name, replacement)
            done[kind] += 1
    notes = [f"one kernel each: {', '.join(f'{count} {kind}' for kind, count in done.items())}"] if done else []
    return [*notes, *(f"{kind} stays as transformers has it: {reason}" for kind, reason in kept.items())]


def _norm(module: nn.Module, implementation: str | None) -> nn.Module | None:
    """A candidate for what looks like an RMS norm: one weight vector and an epsilon."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = next((getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if eps is None or module.weight.ndim != 1:
        return None
    options = {"eps": eps, "implementation": implementation}
    candidates = [FusedNorm(module.weight, offset=offset, **options) for offset in (0.0, 1.0)]
    return min(candidates, key=lambda candidate: _difference(module, candidate))


def _gate(module: nn.Module, implementation: str | None) -> nn.Module | None:
    """A candidate for what looks like a gated feed-forward block with three plain linear layers."""
    children = dict(module.named_children())
    layers = [children.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(type(layer) is not nn.Linear for layer in layers) or set(children) - {
        "gate_proj",
        "up_proj",
        "down_proj",
        "act_fn",
    }:
        return None
    gate, up, down = layers
    if (gate.bias is None) != (up.bias is None) or gate.weight.shape != up.weight.shape:
        return None
    return FusedGate(gate, up, down, implementation=implementation)


def _difference(module: nn.Module, replacement: nn.Module) -> float:
    """Largest difference on random rows, over what is allowed."""
    weight = next(module.parameters())
    width = module.gate_proj.in_features if hasattr(module, "gate_proj") else weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _ROWS, width, generator=generator).to(weight.device, weight.dtype)
    wanted, found = module(x).float(), replacement(x).float()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)) / _TOLERANCES[weight.dtype]
