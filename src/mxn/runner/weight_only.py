"""Linear layers with 8- or 4-bit weights on a GPU, by torch's own kernels: half the memory of bf16, or a quarter.

    fp8    e4m3 weights with a scale per output, inputs rounded to e4m3 with a scale per token; `torch._scaled_mm`
    int4   groups of 64 weights with a scale and a zero, bf16 inputs; `torch._weight_int4pack_mm`

Every layer is compared with the one it replaces on random input; where torch's kernel does not serve the chip or the
shape, the layer stays and is counted in the notes. Embeddings and the output head keep their numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from mxn.errors import KernelUnavailableError

GROUP = 64
_INNER_K_TILES = 8
_MAX_ERRORS = {"fp8": 0.08, "int4": 0.25}
"""Largest relative error (2-norm) of a layer on random input. e4m3 gives 0.04, int4 with groups of 64 about 0.11; a
wrong scale or order gives 1 and more."""


class Fp8Linear(nn.Module):
    """y = x W^T with both sides in e4m3, scaled per row of x and per row of W, summed in fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.dtype = _fp8_dtype(linear.weight.device)
        self._largest = torch.finfo(self.dtype).max
        weight, scale = self._rounded(linear.weight)
        self.register_buffer("weight", weight)  # (out, in); its transpose is the column-major side torch asks for
        self.register_buffer("scale", scale.t().contiguous())  # (1, out)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = self._rounded(x.flatten(0, -2))
        out = torch._scaled_mm(rows, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def _rounded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """e4m3 rows and their scales (rows, 1)."""
        scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / self._largest
        return (rows.float() / scale).clamp(-self._largest, self._largest).to(self.dtype), scale


class Int4Linear(nn.Module):
    """y = x W^T with 4-bit weights in groups along the input; x is rounded to bf16, which torch's kernel asks for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        numbers, scales = _to_int4(linear.weight)
        if linear.weight.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        else:  # two weights to a byte, the first in the high half
            halves = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(halves, _INNER_K_TILES)
        self.register_buffer("weight", packed)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2).to(torch.bfloat16).contiguous()
        multiply = (
            torch.ops.aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch.ops.aten._weight_int4pack_mm
        )
        out = multiply(rows, self.weight, GROUP, self.scales).to(x.dtype).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


@torch.inference_mode()
def quantise_weights(model: PreTrainedModel, kind: str) -> Sequence[str]:
    """Replaces the model's linear layers in place and answers with notes. Args: kind: "fp8" or "int4".

    Raises: KernelUnavailableError with the reason when not one layer could be replaced.
    """
    make: Callable[[nn.Linear], nn.Module] = {"fp8": Fp8Linear, "int4": Int4Linear}[kind]
    head = model.get_output_embeddings()
    num_done, kept = 0, Counter[str]()
    worst = 0.0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is not nn.Linear or module is head:
                continue
            reason, error = _why_not(module, kind), 0.0
            if reason is None:
                try:
                    replacement = make(module)
                    error = _error(module, replacement)
                except RuntimeError as fault:  # torch's word on a chip or a shape that its kernel does not serve
                    reason = str(fault).strip().partition("\n")[0]
                else:
                    reason = None if error <= _MAX_ERRORS[kind] else f"it would be off by {error:.2g}"
            if reason is not None:
                kept[reason] += 1
                continue
            setattr(parent, name, replacement)
            num_done += 1
            worst = max(worst, error)
    if not num_done:
        why = "; ".join(kept) or "the model has no linear layers"
        raise KernelUnavailableError(f"{kind} weights were asked for and no layer can have them: {why}")
    notes = [f"{num_done} linear layers as {kind}, each within {worst:.2g} of what it was on random input"]
    return [*notes, *(f"{count} linear layers stay as they are: {reason}" for reason, count in kept.items())]


def _why_not(linear: nn.Linear, kind: str) -> str | None:
    """What torch's kernels ask of a shape."""
    inputs, outputs = linear.in_features, linear.out_features
    if kind == "fp8" and (inputs % 16 or outputs % 16):
        return f"fp8 asks for multiples of 16, found {outputs} x {inputs}"
    if kind == "int4" and (inputs % max(GROUP, 16 * _INNER_K_TILES) or outputs % 16):
        return (
            f"int4 asks for inputs in multiples of {16 * _INNER_K_TILES} and outputs of 16, found {outputs} x {inputs}"
        )
    return None


def _to_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers 0 to 15 (out, in) int32, and scales with zeros (groups, out, 2) bf16: w = (number - 8) * scale + zero."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    # Rounded as they will be stored, so that the numbers fit what is multiplied later.
    scale = ((high - low) / 15).clamp(min=1e-8).to(torch.bfloat16).float()
    zero = (low + 8 * scale).to(torch.bfloat16).float()
    numbers = ((groups - zero) / scale + 8).round().clamp(0, 15).to(torch.int32).flatten(1)
    scales = torch.cat([scale, zero], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return numbers.contiguous(), scales


def _error(linear: nn.Linear, replacement: nn.Module) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, linear.in_features, generator=generator).to(linear.weight.device, linear.weight.dtype)
    wanted, found = linear(x).float(), replacement(x).float()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _fp8_dtype(device: torch.device) -> torch.dtype:
    """e4m3 as the chip has it: gfx942 has a form of its own."""
    if device.type == "cuda" and torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return torch.float8_e4m3fnuz if architecture.startswith("gfx942") else torch.float8_e4m3fn
    return torch.float8_e4m3fn
