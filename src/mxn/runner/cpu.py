"""How a model is loaded on a CPU: number format, attention backend and threads, each choice with a note."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mxn.attention.base import AttentionBackend
from mxn.attention.reference import ReferenceAttention
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.errors import ConfigError, KernelUnavailableError, OutOfMemoryError
from mxn.runner.attention_check import disagreement
from mxn.runner.loading import LoadProgress, check_weight_files, count_weights
from mxn.runner.torch_runner import ForwardFactory, LoadPlan, TorchRunner, load_runner, module_forward

QUANTISATIONS = ("auto", "int8", "bf16", "fp32")
ATTENTIONS = ("auto", "cpu-cpp", "reference")
OPTIONS = {"program": ("auto", "modules", "step")}
"""How a step is computed: as one C++ program, by transformers' modules, or the first if it agrees with the second."""

_GIB = 2**30
_KV_SHARE = 0.5
"""Of the free memory for an "auto" KV cache; the rest is for activations, the page cache and other processes."""
_SPARE = 1.1
"""Room that loading needs beyond the weights themselves."""


def load_cpu_runner(
    model: Model, settings: LoadSettings, *, cores: int, free_bytes: Callable[[], int], progress: LoadProgress
) -> TorchRunner:
    """Loads a model for this process's CPU cores.

    Args: cores: what "auto" threads means. free_bytes: memory that may still be taken, asked before and after loading.
    """
    _check_settings(settings)
    threads = settings.threads or cores
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    progress("kernels", 0.0)
    plan = _plan(model, settings, threads, free_bytes)
    progress("kernels", 1.0)
    _check_memory(model, plan, free_bytes())
    return load_runner(model, settings, plan, progress)


def _plan(model: Model, settings: LoadSettings, threads: int, free_bytes: Callable[[], int]) -> LoadPlan:
    wants_kernels = settings.quantisation == "int8" or settings.attention == "cpu-cpp"
    missing = None
    if wants_kernels or settings.quantisation == "auto":
        missing = _kernels_missing(model.spec, threads)
    if missing and wants_kernels:
        raise KernelUnavailableError(f"the C++ kernels were asked for and are not available: {missing}")
    quantisation = settings.quantisation
    if quantisation == "auto":
        quantisation = "fp32" if missing else "int8"
    attention = settings.attention
    if attention == "auto":
        attention = "cpu-cpp" if quantisation == "int8" else "reference"
    if attention == "cpu-cpp" and settings.block_size % 16:
        raise ConfigError(f"attention cpu-cpp needs a block_size that is a multiple of 16, got {settings.block_size}")

    notes = [_note_on_numbers(settings, quantisation, missing), f"{threads} compute threads"]
    dtype: torch.dtype | None = torch.bfloat16 if quantisation == "bf16" else torch.float32
    kv_dtype = dtype
    if quantisation == "int8" and not _fits(model, torch.float32, free_bytes()):
        dtype = None
        notes.append("weights read in the files' own precision before quantising, to save memory")
    make_attention: Callable[..., AttentionBackend]
    block_bytes: Callable[..., int]
    if attention == "cpu-cpp":
        from mxn.attention.paged import PagedCpuAttention

        make_attention = partial(PagedCpuAttention, threads=threads)
        block_bytes = PagedCpuAttention.bytes_per_block
        notes.append("attention cpu-cpp: C++ over a float16 KV cache")
    else:
        make_attention = partial(ReferenceAttention, dtype=kv_dtype)
        block_bytes = partial(ReferenceAttention.bytes_per_block, dtype=kv_dtype)
        notes.append(f"attention reference: plain torch over a {str(kv_dtype).removeprefix('torch.')} KV cache")
    return LoadPlan(
        device="cpu",
        dtype=dtype,
        quantisation=quantisation,
        make_attention=make_attention,
        block_bytes=block_bytes,
        quantise=partial(_quantise, threads=threads) if quantisation == "int8" else None,
        make_forward=_program(settings, quantisation, attention),
        free_bytes=lambda: int(free_bytes() * _KV_SHARE),
        threads=threads,
        notes=tuple(notes),
    )


def _program(settings: LoadSettings, quantisation: str, attention: str) -> ForwardFactory:
    """How a step is computed: the option "program", "auto" unless set."""
    wanted = dict(settings.options).get("program", "auto")
    if (quantisation, attention) == ("int8", "cpu-cpp"):
        from mxn.runner.program import choose_program

        return partial(choose_program, wanted=wanted)
    if wanted == "step":
        raise ConfigError(
            f'program "step" needs quantisation int8 and attention cpu-cpp, got {quantisation} and {attention}'
        )
    return module_forward


def _note_on_numbers(settings: LoadSettings, quantisation: str, missing: str | None) -> str:
    if settings.quantisation != "auto":
        return f"numbers {quantisation}, as set"
    if missing:
        return f"numbers fp32, because the C++ kernels are not available: {missing}"
    return f"numbers {quantisation}, chosen as the fastest that keeps the model's likelihood"


def _kernels_missing(spec: ModelSpec, threads: int) -> str | None:
    """Why the C++ kernels cannot serve this model, or None once they are built and agree with the torch reference."""
    try:
        from mxn.attention.paged import PagedCpuAttention, prepare_cpu_kernels

        prepare_cpu_kernels()
        return disagreement(partial(PagedCpuAttention, threads=threads), spec)
    except (KernelUnavailableError, ImportError) as error:
        return str(error)


def _quantise(model: torch.nn.Module, *, threads: int) -> Sequence[str]:
    from mxn.runner.quantise import quantise_int8

    return quantise_int8(model, threads=threads).lines()


def _check_settings(settings: LoadSettings) -> None:
    for name, found, available in (
        ("quantisation", settings.quantisation, QUANTISATIONS),
        ("attention", settings.attention, ATTENTIONS),
    ):
        if found not in available:
            raise ConfigError(f'{name} "{found}" is not offered by the cpu backend; available: {", ".join(available)}')
    if settings.threads is not None and settings.threads < 1:
        raise ConfigError(f"threads must be at least 1, got {settings.threads}")
    for name, value in settings.options:
        if name not in OPTIONS:
            raise ConfigError(f'the cpu backend has no option "{name}"; available: {", ".join(OPTIONS)}')
        if value not in OPTIONS[name]:
            raise ConfigError(f'{name} "{value}" is not offered; available: {", ".join(OPTIONS[name])}')


def _fits(model: Model, dtype: torch.dtype, free: int) -> bool:
    return count_weights(check_weight_files(model.folder)) * dtype.itemsize * _SPARE <= free


def _check_memory(model: Model, plan: LoadPlan, free: int) -> None:
    """Refuses weights that cannot fit before minutes are spent on reading them."""
    dtype = plan.dtype or torch.bfloat16
    if not _fits(model, dtype, free):
        num_weights = count_weights(check_weight_files(model.folder))
        smaller = "" if dtype is torch.bfloat16 else "; bf16 would take half of that"
        raise OutOfMemoryError(
            f"{model.name} needs {num_weights * dtype.itemsize * _SPARE / _GIB:.1f} GiB to load "
            f"{num_weights / 1e9:.2f} billion weights, {free / _GIB:.1f} GiB is free{smaller}"
        )
