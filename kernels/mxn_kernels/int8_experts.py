"""A mixture of experts in 8 bits, in one call: grouping by expert, gate and up, activation, down, weighted sum."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mxn_kernels.cpu.library import Workspace
from mxn_kernels.int8_linear import Int8Weight, int8_linear_reference


@dataclass(frozen=True, kw_only=True)
class Gate:
    """g, u -> g * sigmoid(slope * g + cubic * g^3) * (u + shift), with g at most `limit` and u within +-`limit`."""

    slope: float = 1.0
    cubic: float = 0.0
    limit: float = float("inf")
    shift: float = 0.0

    def __call__(self, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The same in torch."""
        g, u = g.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
        return g * torch.sigmoid(self.slope * g + self.cubic * g**3) * (u + self.shift)


SILU = Gate()
GELU_TANH = Gate(slope=1.5957691216, cubic=0.0713548163)
"""0.5 * (1 + tanh(z)) is sigmoid(2 z), with z = sqrt(2 / pi) * (g + 0.044715 g^3)."""


class _Gate(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("slope", "cubic", "limit", "shift")]


class _Experts(ctypes.Structure):
    _fields_ = [
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("num_experts", ctypes.c_int32),
        ("gate", _Gate),
    ]


class Int8Experts:
    """Experts of one shape over packed weights.

    Args: gate_up: per expert [2 x inner, hidden]: gate channels, then up channels. down: per expert [hidden, inner].
    Raises: ValueError naming the first expert that does not fit.
    """

    def __init__(self, gate_up: Sequence[Int8Weight], down: Sequence[Int8Weight], gate: Gate) -> None:
        if not gate_up or len(gate_up) != len(down):
            raise ValueError(f"each expert needs gate_up and down, found {len(gate_up)} and {len(down)}")
        self.hidden, self.inner = gate_up[0].k, down[0].k
        for index, (first, second) in enumerate(zip(gate_up, down, strict=True)):
            found = (first.n, first.k, second.n, second.k)
            if found != (2 * self.inner, self.hidden, self.hidden, self.inner):
                raise ValueError(
                    f"expert {index} must be {2 * self.inner} x {self.hidden} and {self.hidden} x {self.inner}, "
                    f"found {found[0]} x {found[1]} and {found[2]} x {found[3]}"
                )
        self.gate_up, self.down, self.gate = tuple(gate_up), tuple(down), gate
        pointers = ctypes.c_void_p * len(gate_up)
        self._tables = [pointers(*(weight.address for weight in weights)) for weights in (gate_up, down)]
        self._struct = _Experts(
            *(ctypes.addressof(table) for table in self._tables),
            len(gate_up),
            _Gate(gate.slope, gate.cubic, gate.limit, gate.shift),
        )
        self.address = ctypes.addressof(self._struct)

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weight in (*self.gate_up, *self.down))


def int8_experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: Int8Experts, *, workspace: Workspace
) -> torch.Tensor:
    """Args: x (T, hidden) float32; chosen (T, k) int64: experts of each token; weights (T, k) float32.

    Returns: (T, hidden) float32: per token the weighted sum over its experts. A row depends on that row alone, bit for
    bit; one that holds NaN or infinity gives NaN. Raises: ValueError if something does not fit or an expert is unknown.
    """
    shape = tuple(chosen.shape)
    if x.dtype is not torch.float32 or x.dim() != 2 or x.shape[1] != experts.hidden:
        raise ValueError(f"x must be float32 (T, {experts.hidden}), found {x.dtype} {tuple(x.shape)}")
    if chosen.dtype is not torch.int64 or len(shape) != 2 or shape[0] != x.shape[0]:
        raise ValueError(f"chosen must be int64 ({x.shape[0]}, k), found {chosen.dtype} {shape}")
    if weights.dtype is not torch.float32 or tuple(weights.shape) != shape:
        raise ValueError(f"weights must be float32 {shape}, found {weights.dtype} {tuple(weights.shape)}")
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
    y = torch.zeros_like(x) if not shape[1] else torch.empty_like(x)
    pointers = (x.data_ptr(), x.shape[0], chosen.data_ptr(), weights.data_ptr(), shape[1], y.data_ptr())
    fault = workspace.library.int8_experts(workspace.handle, experts.address, *pointers)
    if fault > 0:
        token, choice = divmod(fault - 1, shape[1])
        raise ValueError(
            f"chosen[{token}, {choice}] is {int(chosen[token, choice])}, expected 0 to {len(experts.gate_up) - 1}"
        )
    if fault:
        raise MemoryError(f"can't allocate memory for {chosen.numel()} rows of experts")
    return y


def int8_experts_reference(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Int8Experts,
    *,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """The same arithmetic in torch, token by token."""
    y = torch.zeros_like(x)
    for token, choices in enumerate(chosen.tolist()):
        for choice, expert in enumerate(choices):
            both = int8_linear_reference(x[token : token + 1], experts.gate_up[expert])
            gated = experts.gate(both[:, : experts.inner], both[:, experts.inner :])
            y[token] += weights[token, choice] * int8_linear_reference(gated, experts.down[expert])[0]
    return y
