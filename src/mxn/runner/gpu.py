"""How a model is loaded on a CUDA or ROCm chip: number format, kernels, graphs and memory, each choice with a note."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from mxn.attention.base import AttentionBackend, AttentionMetadata, LayerKV, to_chip
from mxn.attention.reference import ReferenceAttention
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.errors import ConfigError, KernelUnavailableError, OutOfMemoryError
from mxn.runner.accelerator import Accelerator, chip_errors
from mxn.runner.attention_check import disagreement
from mxn.runner.forward import ModuleForward
from mxn.runner.gpu_runner import GpuRunner
from mxn.runner.graphs import CapturedAttention, graph_sizes
from mxn.runner.inputs import StepInputs, build_inputs
from mxn.runner.loading import LoadProgress, check_weight_files, count_weights
from mxn.runner.torch_runner import LoadPlan, dummy_batch, load_runner

ATTENTIONS = ("auto", "triton", "reference")
OPTIONS: dict[str, tuple[str, ...]] = {
    "graphs": ("background", "wait", "off"),
    "prefill": ("auto", "triton", "flash-attention-3", "flashinfer"),
    "kv": ("auto", "fp8"),
    "fuse": ("auto", "off"),
    "splits": ("auto", "1", "2", "4", "8", "16", "32"),
    "ahead": ("auto", "off"),
}
"""graphs: capture decode while serving, before it, or never. prefill: who computes it. kv: the cache's numbers, auto
for the model's own. fuse: norms and gates as one kernel each. splits: of a decoding sequence's context; a fixed number
makes its result independent of the batch, bit for bit. ahead: the next step is prepared while the chip runs one."""

_GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SPARE = 1.1
"""Room that loading needs beyond the weights themselves."""
_RESERVE_BYTES = 512 * 2**20
_RESERVE_SHARE = 0.02
"""What is left alone: libraries' workspaces, and pieces too small to use, which grow with the chip's memory."""


@dataclass(kw_only=True)
class MemoryPlan:
    """Where a chip's bytes go. Filled while a model is loaded, in this order; the KV cache gets the rest.

    weights: bytes of the loaded model. activations: most that a full step held, seen in a profiling run.
    graphs: what captured decode steps keep: their logits, and the activations of the largest once.
    """

    total: int
    reserve: int
    weights: int = 0
    activations: int = 0
    graphs: int = 0

    @classmethod
    def of(cls, accelerator: Accelerator) -> MemoryPlan:
        total = accelerator.total_bytes()
        return cls(total=total, reserve=_RESERVE_BYTES + int(_RESERVE_SHARE * total))

    def kv_bytes(self, free: int) -> int:
        """What the KV cache may take of what is free once the weights are loaded."""
        return max(0, free - self.activations - self.graphs - self.reserve)

    def line(self, free: int) -> str:
        def gib(count: int) -> str:
            return f"{count / _GIB:.2f}"

        return (
            f"memory in GiB of {gib(self.total)}: weights {gib(self.weights)}, activations {gib(self.activations)} "
            f"(a full step, measured), graphs {gib(self.graphs)} (estimated), reserve {gib(self.reserve)}, "
            f"for the KV cache {gib(self.kv_bytes(free))}"
        )


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """What was decided before loading, and why."""

    quantisation: str
    dtype: torch.dtype
    attention: Callable[..., AttentionBackend]
    block_bytes: Callable[..., int]
    is_triton: bool
    options: dict[str, str]
    notes: list[str] = field(default_factory=list)


def load_gpu_runner(
    model: Model,
    settings: LoadSettings,
    *,
    accelerator: Accelerator,
    quantisations: Sequence[str],
    progress: LoadProgress,
    sampler: str | None = None,
) -> GpuRunner:
    """Loads a model for one chip.

    Args: quantisations: what the chip can do, the default first. sampler: implementation of the `sample` op.
    Raises: ConfigError, KernelUnavailableError, OutOfMemoryError, ModelError; each with what to do.
    """
    accelerator.select()
    choices = _choose(model.spec, settings, accelerator, quantisations)
    memory = MemoryPlan.of(accelerator)
    _check_memory(model, choices.dtype, accelerator.free_bytes())
    wants_graphs = choices.options["graphs"] != "off" and choices.is_triton

    def profile(loaded: PreTrainedModel, layers: Sequence[LayerKV], windows: Sequence[int | None]) -> Sequence[str]:
        _profile(memory, loaded, layers, windows, settings, choices, accelerator, wants_graphs)
        return (memory.line(accelerator.free_bytes()),)

    def make_runner(**parts: object) -> GpuRunner:
        attention = parts["attention"]
        return GpuRunner(
            accelerator=accelerator,
            plan_step=_planner(attention, accelerator),
            captured=_captured(attention, settings.max_num_seqs, parts["max_context"]) if wants_graphs else None,
            max_num_seqs=settings.max_num_seqs,
            sampler=sampler,
            waits_for_graphs=choices.options["graphs"] == "wait",
            takes_steps_ahead=choices.options["ahead"] == "auto",
            **parts,
        )

    def prepare(loaded: PreTrainedModel) -> Sequence[str]:
        notes: list[str] = []
        if choices.quantisation in ("fp8", "int4"):
            from mxn.runner.weight_only import quantise_weights

            notes += quantise_weights(loaded, choices.quantisation)
        if choices.is_triton and choices.options["fuse"] == "auto":
            from mxn.runner.fused import fuse

            notes += fuse(loaded)
        return notes

    plan = LoadPlan(
        device=str(accelerator.device),
        dtype=choices.dtype,
        quantisation=choices.quantisation,
        make_attention=choices.attention,
        block_bytes=choices.block_bytes,
        quantise=prepare,
        free_bytes=lambda: memory.kv_bytes(accelerator.free_bytes()),
        takes_rest=True,
        profile=profile,
        make_runner=make_runner,
        notes=tuple(choices.notes),
    )
    with chip_errors(f"loading {model.name}"):
        return load_runner(model, settings, plan, progress)


# ---------------------------------------------------------------- choosing


def _choose(
    spec: ModelSpec, settings: LoadSettings, accelerator: Accelerator, quantisations: Sequence[str]
) -> _Choices:
    options = _checked_options(settings)
    quantisation = settings.quantisation
    if quantisation == "auto":
        quantisation = quantisations[0]
    if quantisation not in quantisations:
        raise ConfigError(
            f'quantisation "{quantisation}" is not offered on this chip; available: auto, {", ".join(quantisations)}'
        )
    if settings.attention not in ATTENTIONS:
        raise ConfigError(f'attention "{settings.attention}" is not offered; available: {", ".join(ATTENTIONS)}')
    dtype = _DTYPES.get(quantisation, torch.bfloat16)
    source = "as set" if settings.quantisation != "auto" else "the chip's first choice"
    notes = [f"numbers {quantisation}, {source}"]
    if settings.attention != "reference":
        why_not = None
        try:
            return _triton_choice(spec, accelerator, quantisation, dtype, options, notes)
        except (KernelUnavailableError, ImportError) as error:
            why_not = str(error)
        if settings.attention == "triton":
            raise KernelUnavailableError(f"attention triton was asked for and cannot be had: {why_not}")
        notes.append(f"attention reference, slow, because the Triton kernels cannot be had: {why_not}")
    return _Choices(
        quantisation=quantisation,
        dtype=dtype,
        attention=partial(ReferenceAttention, dtype=dtype, device=accelerator.device),
        block_bytes=partial(ReferenceAttention.bytes_per_block, dtype=dtype),
        is_triton=False,
        options=options,
        notes=notes,
    )


def _triton_choice(
    spec: ModelSpec,
    accelerator: Accelerator,
    quantisation: str,
    dtype: torch.dtype,
    options: dict[str, str],
    notes: list[str],
) -> _Choices:
    """The Triton kernels, once they agree with the reference on the model's head shapes on this chip.

    Raises: KernelUnavailableError with the reason.
    """
    from mxn.attention.triton import PREFILLS, TritonAttention, fp8_dtype

    stored, scaling = dtype, "none"
    if options["kv"] == "fp8":
        stored, scaling = fp8_dtype(accelerator.device), "token_head"
    splits = None if options["splits"] == "auto" else int(options["splits"])
    shape = {"dtype": stored, "scaling": scaling}
    attention = partial(
        TritonAttention, **shape, device=accelerator.device, num_heads=spec.num_heads, num_splits=splits
    )
    is_asked = options["prefill"] != "auto"
    for prefill in (options["prefill"],) if is_asked else PREFILLS:
        made = partial(attention, prefill=prefill)
        try:
            fault = disagreement(made, spec, device=accelerator.device, dtype=dtype)
        except KernelUnavailableError as error:
            fault = str(error)
            if is_asked:
                raise ConfigError(f"{fault}; available: auto, triton") from error
            if prefill == "triton":
                raise
            continue  # why it cannot be had stands in the notes of the one that can
        if fault is None:
            notes.append("attention kernels checked against the torch reference on this chip")
            return _Choices(
                quantisation=quantisation,
                dtype=dtype,
                attention=made,
                block_bytes=partial(TritonAttention.bytes_per_block, **shape),
                is_triton=True,
                options=options,
                notes=notes,
            )
        notes.append(fault)
    raise KernelUnavailableError(fault)


def _checked_options(settings: LoadSettings) -> dict[str, str]:
    options = {name: values[0] for name, values in OPTIONS.items()}
    for name, value in settings.options:
        if name not in OPTIONS:
            raise ConfigError(f'there is no option "{name}"; available: {", ".join(OPTIONS)}')
        if value not in OPTIONS[name]:
            raise ConfigError(f'{name} "{value}" is not offered; available: {", ".join(OPTIONS[name])}')
        options[name] = value
    return options


def _check_memory(model: Model, dtype: torch.dtype, free: int) -> None:
    """Refuses weights that cannot fit before minutes are spent on reading them."""
    num_weights = count_weights(check_weight_files(model.folder))
    needed = int(num_weights * dtype.itemsize * _SPARE)
    if needed > free:
        raise OutOfMemoryError(
            f"{model.name} needs {needed / _GIB:.1f} GiB for {num_weights / 1e9:.2f} billion weights as "
            f"{str(dtype).removeprefix('torch.')}, {free / _GIB:.1f} GiB of the chip's memory is free"
        )


# ---------------------------------------------------------------- metadata


def _planner(attention: AttentionBackend, accelerator: Accelerator) -> Callable[[AttentionMetadata], AttentionMetadata]:
    """Puts a step's metadata on the chip; with the Triton kernels, their plan of the step too."""
    device = accelerator.device
    if isinstance(attention, ReferenceAttention):
        return partial(_moved, device=device)
    from mxn.attention.triton import plan_step

    return partial(plan_step, attention=attention, device=device)


def _moved(meta: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    tensors = {name: getattr(meta, name) for name in ("query_starts", "context_lens", "block_table", "slot_mapping")}
    moved = {name: to_chip(tensor, device) for name, tensor in tensors.items()}
    return AttentionMetadata(**moved, max_query_len=meta.max_query_len)


def _captured(attention: AttentionBackend, max_num_seqs: int, max_context: int) -> CapturedAttention:
    from mxn.attention.triton import CapturedDecode

    return CapturedDecode(attention, max_num_seqs, max_context)


# ---------------------------------------------------------------- profiling


def _profile(
    memory: MemoryPlan,
    model: PreTrainedModel,
    layers: Sequence[LayerKV],
    windows: Sequence[int | None],
    settings: LoadSettings,
    choices: _Choices,
    accelerator: Accelerator,
    wants_graphs: bool,
) -> None:
    """Runs the fullest step over a cache of its own and fills in what it held."""
    from mxn.runner.torch_runner import tensor_bytes

    num_seqs = min(settings.max_num_seqs, settings.max_step_tokens)
    tokens_each = settings.max_step_tokens // num_seqs
    batch = dummy_batch(num_seqs, tokens_each, settings.block_size)
    num_blocks = num_seqs * -(-tokens_each // settings.block_size)
    attention = choices.attention(layers, num_blocks, settings.block_size)
    forward = ModuleForward(model, attention, windows)
    host = build_inputs(batch, settings.block_size, torch.device("cpu"))
    inputs = StepInputs(
        token_ids=host.token_ids.to(accelerator.device),
        positions=host.positions.to(accelerator.device),
        logit_rows=host.logit_rows.to(accelerator.device),
        row_ranges=host.row_ranges,
        attention=_planner(attention, accelerator)(host.attention),
    )
    memory.weights = tensor_bytes(model)
    vocab_size = int(model.config.vocab_size)
    sampling = 3 * num_seqs * vocab_size * 4  # copies that the torch sampler makes of all rows, in fp32
    memory.activations = accelerator.peak_bytes(lambda: forward(inputs)) + sampling
    if wants_graphs:
        rows = sum(graph_sizes(settings.max_num_seqs))
        memory.graphs = rows * vocab_size * choices.dtype.itemsize
        memory.graphs += memory.activations * settings.max_num_seqs // settings.max_step_tokens
