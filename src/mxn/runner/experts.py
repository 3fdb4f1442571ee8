"""8-bit experts: a mixture's stacked weights, found by shape and value in any architecture, become one kernel.

What is asked of a module before it is replaced: its float form, as read here, gives what the module gives; and the
8-bit form is near that on random hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.int8_experts import GELU_TANH, SILU, Gate, Int8Experts, int8_experts
from mxn_kernels.int8_linear import Int8Weight, int8_linear, pack_int8
from torch import nn
from torch.nn import functional

from mxn.errors import ModelError

MAX_EXPERT_ERROR = 0.05
"""Relative error (2-norm, normal input) of any expert's matrix, and of the whole, above which floats are kept;
well-behaved weights give 0.01 and 0.02."""

_MAX_FORM_ERROR = 1e-4
_CHECK_ROWS = 13


class NotExperts(Exception):
    """Why a module cannot be replaced."""


@dataclass(frozen=True, kw_only=True)
class ExpertsForm:
    """How a module keeps its experts. `is_interleaved`: channels are gate, up, gate, up, ..."""

    module: nn.Module
    gate: Gate
    is_transposed: bool
    is_interleaved: bool

    @property
    def num_experts(self) -> int:
        return int(self.module.down_proj.shape[0])

    def matrices(self, expert: int) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight [n, k] and bias [n] or None of gate_up_proj (gate channels first) and down_proj."""
        found = {}
        for name in ("gate_up_proj", "down_proj"):
            weight, bias = getattr(self.module, name)[expert], getattr(self.module, f"{name}_bias", None)
            weight, bias = weight.T if self.is_transposed else weight, None if bias is None else bias[expert]
            if name == "gate_up_proj" and self.is_interleaved:
                weight = torch.cat([weight[::2], weight[1::2]])
                bias = None if bias is None else torch.cat([bias[::2], bias[1::2]])
            found[name] = (weight, bias)
        return found

    def compute(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """In plain float32, expert by expert."""
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, choices = torch.where(chosen == expert)
            (gate_up, gate_up_bias), (down, down_bias) = (
                (w.float(), b if b is None else b.float()) for w, b in self.matrices(expert).values()
            )
            gated = self.gate(*functional.linear(x[rows], gate_up, gate_up_bias).chunk(2, dim=-1))
            y.index_add_(0, rows, functional.linear(gated, down, down_bias) * weights[rows, choices, None])
        return y


class KernelExperts(nn.Module):
    """All experts of a layer in one call; takes any float dtype and answers in it."""

    def __init__(self, experts: Int8Experts, workspace: Workspace) -> None:
        super().__init__()
        self.packed, self.workspace = experts, workspace
        for index, weight in enumerate((*experts.gate_up, *experts.down)):  # so that a model's memory can be summed up
            for name in ("panels", "scales", "bias"):
                self.register_buffer(f"packed_{index}_{name}", getattr(weight, name), persistent=False)

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, self.packed.hidden).float()
        y = int8_experts(rows, chosen, weights.float(), self.packed, workspace=self.workspace)
        return y.to(hidden_states.dtype).view_as(hidden_states)

    def extra_repr(self) -> str:
        return f"num_experts={len(self.packed.gate_up)}, hidden={self.packed.hidden}, inner={self.packed.inner}"


def are_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts, whatever it does with them."""
    return any(p.dim() == 3 for p in module.parameters(recurse=False)) and hasattr(module, "down_proj")


def pack_experts(name: str, module: nn.Module, workspace: Workspace, generator: torch.Generator) -> KernelExperts:
    """The 8-bit form of a module, compared with it.

    Raises: NotExperts with the reason to keep the floats; ModelError naming a tensor that holds NaN or infinity.
    """
    for key, parameter in module.named_parameters(recurse=False):
        if not torch.isfinite(parameter).all():
            raise ModelError(f"{name}.{key} holds NaN or infinity; the weights are damaged")
    form = recognise_experts(module)
    hidden = next(iter(form.matrices(0).values()))[0].shape[1]
    x = torch.randn(_CHECK_ROWS, hidden, generator=generator)
    scores = torch.rand(_CHECK_ROWS, form.num_experts, generator=generator)
    weights, chosen = scores.topk(min(2, form.num_experts), dim=-1)
    expected = form.compute(x, chosen, weights)
    dtype = module.down_proj.dtype
    try:
        given = module(x.to(dtype), chosen, weights.to(dtype)).float()
    except (RuntimeError, TypeError, IndexError) as error:
        raise NotExperts(f"it is not called with hidden states, experts and weights ({error})") from error
    tolerance = _MAX_FORM_ERROR if dtype is torch.float32 else 8 * torch.finfo(dtype).eps
    if given.shape != expected.shape or not _relative_error(expected, given) <= tolerance:
        raise NotExperts("it computes more than gate, up, activation, down and a weighted sum")
    packed: dict[str, list[Int8Weight]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(form.num_experts):
        for key, (weight, bias) in form.matrices(expert).items():
            packed[key].append(_packed(f"{key} of expert {expert}", weight, bias, workspace, generator))
    experts = KernelExperts(Int8Experts(packed["gate_up_proj"], packed["down_proj"], form.gate), workspace)
    error = _relative_error(experts(x, chosen, weights), expected)
    if not error <= MAX_EXPERT_ERROR:
        raise NotExperts(f"8 bits would be off by {error:.1%}, more than {MAX_EXPERT_ERROR:.0%}")
    return experts


def recognise_experts(module: nn.Module) -> ExpertsForm:
    """Raises: NotExperts with the reason."""
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if any(not isinstance(w, nn.Parameter) or w.dim() != 3 for w in (gate_up, down)):
        raise NotExperts("it has no stacked gate_up_proj and down_proj")
    known = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    others = sorted({name for name, _ in module.named_parameters()} - known)
    if others:
        raise NotExperts(f"it also has {', '.join(others)}")
    experts, hidden, inner = down.shape
    if gate_up.shape == (experts, 2 * inner, hidden):
        is_transposed = False
    elif gate_up.shape == (experts, inner, 2 * hidden):
        is_transposed, inner = True, hidden
    else:
        raise NotExperts(f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} do not fit")
    gate, is_interleaved = _gate(module, inner)
    return ExpertsForm(module=module, gate=gate, is_transposed=is_transposed, is_interleaved=is_interleaved)


def _gate(module: nn.Module, inner: int) -> tuple[Gate, bool]:
    """By value: what `_apply_gate` makes of gate and up channels, side by side or interleaved."""
    apply = getattr(module, "_apply_gate", None)
    if not callable(apply):
        raise NotExperts("it has no function of its own from gate and up to the activation")
    known = [SILU, GELU_TANH]
    alpha, limit = (getattr(module, name, None) for name in ("alpha", "limit"))
    if isinstance(limit, float | int):
        known += [
            Gate(slope=alpha if isinstance(alpha, float | int) else 1.0, limit=limit, shift=s) for s in (0.0, 1.0)
        ]
    x = torch.linspace(-12, 12, 16 * 2 * inner)[
        torch.randperm(16 * 2 * inner, generator=torch.Generator().manual_seed(0))
    ]
    x = x.view(16, 2 * inner)
    found = apply(x)
    for gate in known:
        for is_interleaved in (False, True):
            g, u = (x[:, ::2], x[:, 1::2]) if is_interleaved else x.chunk(2, dim=-1)
            if torch.allclose(gate(g, u), found, rtol=1e-5, atol=1e-5):
                return gate, is_interleaved
    raise NotExperts("its activation is none of SiLU, GELU in its tanh form and clamped SwiGLU")


def _packed(
    what: str, weight: torch.Tensor, bias: torch.Tensor | None, workspace: Workspace, generator: torch.Generator
) -> Int8Weight:
    packed = pack_int8(weight, bias, workspace=workspace)
    x = torch.randn(3, packed.k, generator=generator)
    expected = functional.linear(x, weight.float(), None if bias is None else bias.float())
    error = _relative_error(int8_linear(x, packed, workspace=workspace), expected)
    if not error <= MAX_EXPERT_ERROR:
        raise NotExperts(f"8 bits would put {what} off by {error:.1%}, more than {MAX_EXPERT_ERROR:.0%}")
    return packed


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
