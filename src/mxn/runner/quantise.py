"""Packed weights for any decoder: a model's linear layers, experts and RMS norms become kernels of `mxn_kernels`.

Nothing is replaced on trust. Each new module is compared with the one it replaces on random input; what differs stays
as it was and is named in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from mxn_kernels.cpu import Workspace, load_library
from mxn_kernels.group_linear import pack_blocks, pack_groups
from mxn_kernels.int8_linear import pack_int8
from mxn_kernels.packed_linear import GROUP, PackedWeight, packed_linear
from mxn_kernels.rms_norm import rms_norm
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mxn.attention.paged import prepare_cpu_kernels
from mxn.errors import ModelError
from mxn.runner.experts import KernelExperts, NotExperts, are_experts, pack_experts
from mxn.runner.gguf_blocks import GgufBlocks
from mxn.runner.tuning import measure

MAX_LINEAR_ERROR = {"int8": 0.05, "int4": 0.1}
"""Relative error (2-norm, normal input) above which a layer is not packed so; well-behaved weights give 0.01 in 8 bits
and 0.07 in 4. What 4 bits do to a whole model is for `likelihood` to say."""

MAX_BLOCK_ERROR = 0.01
"""How far a file's blocks may be from the weights that were loaded, which are the same rounded to bfloat16."""

MAX_NORM_ERROR = 1e-4
"""Relative error of a norm: both sides compute in float32, so only the order of summation differs."""

FLOAT_FORMAT = "q4_1"
"""What float weights become in 4 bits: a scale and a minimum per 32 inputs. Normal weights are then 0.070 off, by
a scale alone (q4_0) 0.081; SmolLM2's negative log-likelihood grows by 1.2 % and 5.4 %."""

CHECK_ROWS = 3

PRODUCT_CASES = {"1 row": (1, 1), "8 rows": (8, 1), "128 rows": (128, 1)}


@dataclass(kw_only=True)
class QuantisationReport:
    """What was replaced, what was not and why. `kept`: (module or parameter, reason)."""

    isa: str
    numbers: str = "int8"
    linears: int = 0
    from_blocks: int = 0
    experts: int = 0
    norms: int = 0
    weight_bytes: int = 0
    float_bytes: int = 0
    kept: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the log and the replica's notes; what was kept for one reason in one line."""
        experts = f", {self.experts} mixtures of experts" if self.experts else ""
        done = f"{self.linears} linear layers{experts} and {self.norms} norms replaced, {len(self.kept)} kept"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept:
            reasons.setdefault(reason, []).append(name)
        if self.numbers == "int4":
            source = f"{self.from_blocks} of them are the GGUF file's own blocks, " if self.from_blocks else ""
            done += f"; {source}experts and the output head are int8"
        return [
            f"{self.numbers} ({self.isa}): {done}",
            *(f"{_listed(names)}: {reason}" for reason, names in reasons.items()),
        ]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class PackedLinear(nn.Module):
    """A linear layer over packed weights; takes any float dtype and answers in it."""

    def __init__(self, weight: PackedWeight, workspace: Workspace) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.k, weight.n
        self.packed, self.workspace = weight, workspace
        for name in ("panels", "scales", "bias"):  # so that whoever sums up a model's memory finds them
            if hasattr(weight, name):
                self.register_buffer(f"packed_{name}", getattr(weight, name), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.float32:
            return packed_linear(x, self.packed, workspace=self.workspace)
        return packed_linear(x.float(), self.packed, workspace=self.workspace).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.packed.format}"


class KernelRMSNorm(nn.Module):
    """Root-mean-square normalisation in one pass; `offset` is 1 where a model stores weight - 1."""

    def __init__(self, weight: torch.Tensor, eps: float, offset: float, workspace: Workspace) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().contiguous(), requires_grad=False)
        self.eps, self.offset, self.workspace = eps, offset, workspace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.float32:
            return rms_norm(x, self.weight, self.eps, offset=self.offset, workspace=self.workspace)
        return rms_norm(x.float(), self.weight, self.eps, offset=self.offset, workspace=self.workspace).to(x.dtype)


def quantise_int8(model: nn.Module, *, threads: int, isa: str | None = None) -> QuantisationReport:
    """Replaces linear layers (the output head too), experts and RMS norms in place; other parameters become float32.

    A head tied to the embedding gets its own 8-bit copy, the embedding stays. Float weights are freed layer by layer.

    Raises: ModelError naming a tensor that holds NaN or infinity; KernelUnavailableError with the reason.
    """
    return _quantise(model, "int8", None, threads, isa)


def quantise_int4(
    model: nn.Module, *, threads: int, blocks: GgufBlocks | None = None, isa: str | None = None
) -> QuantisationReport:
    """The same with 4-bit weights and a scale per 32 inputs in the layers; experts and the output head get 8 bits.

    Args: blocks: of the file that the model came from; a layer that lies there in 4 or 8 bits takes it over unrounded.
    """
    return _quantise(model, "int4", blocks, threads, isa)


@torch.no_grad()
def _quantise(
    model: nn.Module, numbers: str, blocks: GgufBlocks | None, threads: int, isa: str | None
) -> QuantisationReport:
    prepare_cpu_kernels(isa)
    workspace = Workspace.shared(threads, isa)
    report = QuantisationReport(isa=workspace.library.isa, numbers=numbers)
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in list(model.named_modules()):
        if _is_linear(module):
            of_module = "int8" if module is head else numbers
            fresh = _packed_linear(name, module, of_module, blocks, workspace, generator, report)
        elif "RMSNorm" in type(module).__name__:
            fresh = _fused_norm(name, module, workspace, generator, report)
        elif are_experts(module):
            fresh = _packed_experts(name, module, workspace, generator, report)
        else:
            _note_unknown(name, module, report)
            continue
        if fresh is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fresh)
    model.float()
    report.float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return report


def kernel_library() -> str:
    """Name of the kernel library in use; it changes with sources, compiler and CPU."""
    return load_library().path.name


def use_threads(threads: int, model: nn.Module, *others: object) -> None:
    """Makes a model's kernel modules, and whatever else has a workspace, compute on so many threads; torch too."""
    for holder in (*model.modules(), *others):
        if isinstance(getattr(holder, "workspace", None), Workspace):
            holder.workspace = Workspace.shared(threads, holder.workspace.library.isa)
    torch.set_num_threads(threads)


@torch.no_grad()
def product_times(hidden_size: int, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one linear layer of a model's width on this CPU: case to "int8" and "fp32"."""
    k = min(hidden_size, 2048)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4 * k if k <= 1024 else 4096, k, generator=generator)
    workspace = Workspace.shared(threads)
    packed = pack_int8(weight, workspace=workspace)
    inputs = {rows: torch.randn(rows, k, generator=generator) for rows, _ in PRODUCT_CASES.values()}
    runs = {
        "int8": lambda shape: packed_linear(inputs[shape[0]], packed, workspace=workspace),
        "fp32": lambda shape: functional.linear(inputs[shape[0]], weight),
    }
    return measure(runs, {name: lambda: None for name in runs}, PRODUCT_CASES, budget_s=0.3)


def _is_linear(module: nn.Module) -> bool:
    """Exactly these classes: a subclass may compute something else."""
    return type(module) in (nn.Linear, Conv1D)


def _packed_linear(
    name: str,
    module: nn.Module,
    numbers: str,
    blocks: GgufBlocks | None,
    workspace: Workspace,
    generator: torch.Generator,
    report: QuantisationReport,
) -> PackedLinear | None:
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    packed = None
    try:
        if numbers == "int4":
            packed = _from_blocks(name, weight, module.bias, blocks, workspace)
            report.from_blocks += packed is not None
            packed = packed or pack_groups(weight, module.bias, format=FLOAT_FORMAT, workspace=workspace)
        else:
            packed = pack_int8(weight, module.bias, workspace=workspace)
    except ValueError as error:
        raise ModelError(f"{name}: {error}; the weights are damaged or of a shape mxn cannot quantise") from error
    x = torch.randn(CHECK_ROWS, packed.k, generator=generator)
    bias = None if module.bias is None else module.bias.float()
    expected = functional.linear(x, weight.float(), bias)
    error = _relative_error(packed_linear(x, packed, workspace=workspace), expected)
    limit = MAX_LINEAR_ERROR[numbers]
    if not error <= limit:
        bits = f"{numbers.removeprefix('int')} bits would be off by {error:.1%}, more than {limit:.0%}"
        if numbers == "int4":
            report.kept.append((name, f"{bits}; kept in 8 bits"))
            return _packed_linear(name, module, "int8", None, workspace, generator, report)
        report.kept.append((name, f"{bits}; kept in float32"))
        return None
    report.linears += 1
    report.weight_bytes += packed.num_bytes
    return PackedLinear(packed, workspace)


def _from_blocks(
    name: str, weight: torch.Tensor, bias: torch.Tensor | None, blocks: GgufBlocks | None, workspace: Workspace
) -> PackedWeight | None:
    """A layer made of the file's own blocks, if they are there and mean the weights that were loaded."""
    found = None if blocks is None else blocks.take(f"{name}.weight")
    if found is None or found[1].shape[0] != weight.shape[0] or weight.shape[1] % GROUP:
        return None
    packed = pack_blocks(found[1], *weight.shape, bias, format=found[0], workspace=workspace)
    return packed if _relative_error(packed.dequantise(), weight.float()) <= MAX_BLOCK_ERROR else None


def _packed_experts(
    name: str, module: nn.Module, workspace: Workspace, generator: torch.Generator, report: QuantisationReport
) -> KernelExperts | None:
    try:
        fresh = pack_experts(name, module, workspace, generator)
    except NotExperts as reason:
        report.kept.append((name, f"{type(module).__name__}: {reason}; kept in float32"))
        return None
    report.experts += 1
    report.weight_bytes += fresh.packed.num_bytes
    return fresh


def _fused_norm(
    name: str, module: nn.Module, workspace: Workspace, generator: torch.Generator, report: QuantisationReport
) -> KernelRMSNorm | None:
    """The kernel form that equals `module` on random input, if there is one."""
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    eps = next(
        (v for v in (getattr(module, a, None) for a in ("variance_epsilon", "eps")) if isinstance(v, float)), None
    )
    if weight is None or weight.dim() != 1 or eps is None or next(module.children(), None) is not None:
        report.kept.append((name, f"{kind} has no plain weight and epsilon; kept"))
        return None
    if not torch.isfinite(weight).all():
        raise ModelError(f"{name}.weight holds NaN or infinity; the weights are damaged")
    x = torch.randn(CHECK_ROWS, weight.shape[0], generator=generator)
    x[0] *= eps**0.5  # so that the epsilon counts
    try:
        expected = module(x.to(weight.dtype)).float()
    except (RuntimeError, TypeError) as error:
        report.kept.append((name, f"{kind} does not take one tensor ({error}); kept"))
        return None
    tolerance = MAX_NORM_ERROR if weight.dtype is torch.float32 else 4 * torch.finfo(weight.dtype).eps
    for offset in (0.0, 1.0):
        fresh = KernelRMSNorm(weight, eps, offset, workspace)
        if _relative_error(fresh(x.to(weight.dtype).float()), expected) <= tolerance:
            report.norms += 1
            return fresh
    report.kept.append((name, f"{kind} is not a root-mean-square norm of its weight; kept"))
    return None


def _note_unknown(name: str, module: nn.Module, report: QuantisationReport) -> None:
    for key, parameter in _own_matrices(module):
        if not torch.isfinite(parameter).all():
            raise ModelError(f"{name}.{key} holds NaN or infinity; the weights are damaged")
        if not isinstance(module, nn.Embedding):
            reason = f"{type(module).__name__} {tuple(parameter.shape)}; kept in float32"
            report.kept.append((f"{name}.{key}", reason))


def _own_matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((k, p) for k, p in module.named_parameters(recurse=False) if p.dim() >= 2 and p.is_floating_point())


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
