"""How a model is loaded on a CPU: number format, attention backend and threads, each choice with a note."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from mxn.attention.base import AttentionBackend
from mxn.attention.reference import ReferenceAttention
from mxn.core.model import LoadSettings, Model
from mxn.errors import ConfigError, KernelUnavailableError, OutOfMemoryError
from mxn.runner.loading import LoadProgress, check_weight_files, count_weights
from mxn.runner.torch_runner import LoadPlan, TorchRunner, load_runner

QUANTISATIONS = ("auto", "int8", "bf16", "fp32")
ATTENTIONS = ("auto", "cpu-cpp", "reference")
_GIB = 2**30


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
    plan = _plan(settings, threads, free_bytes)
    progress("kernels", 1.0)
    _check_memory(model, plan, free_bytes())
    return load_runner(model, settings, plan, progress)


def _plan(settings: LoadSettings, threads: int, free_bytes: Callable[[], int]) -> LoadPlan:
    reason = None
    kernels: type[AttentionBackend] | None = None
    if settings.quantisation in ("auto", "int8") or settings.attention == "cpu-cpp":
        try:
            kernels = _kernel_attention(threads)
        except KernelUnavailableError as error:
            if settings.quantisation == "int8" or settings.attention == "cpu-cpp":
                raise
            reason = str(error)

    quantisation = settings.quantisation
    if quantisation == "auto":
        quantisation = "int8" if kernels is not None else "fp32"
    dtype = torch.bfloat16 if quantisation == "bf16" else torch.float32
    wants_kernels = settings.attention == "cpu-cpp" or (settings.attention == "auto" and quantisation == "int8")
    notes = [_note_on_numbers(settings, quantisation, reason), f"{threads} compute threads"]
    if wants_kernels and kernels is not None:
        attention, options = kernels, {"threads": threads}
        notes.append("attention cpu-cpp: C++ over a float16 KV cache")
    else:
        attention, options = ReferenceAttention, {"dtype": dtype, "device": "cpu"}
        notes.append(
            f"attention reference: plain torch over a {'bfloat16' if quantisation == 'bf16' else 'float32'} KV cache"
        )
    return LoadPlan(
        device="cpu",
        dtype=dtype,
        quantisation=quantisation,
        attention=attention,
        attention_options=options,
        quantise=partial(_quantise, threads=threads) if quantisation == "int8" else None,
        free_bytes=lambda: free_bytes() // 2,  # the other half is for activations, the page cache and other processes
        threads=threads,
        notes=tuple(notes),
    )


def _note_on_numbers(settings: LoadSettings, quantisation: str, reason: str | None) -> str:
    if reason is not None:
        return f"numbers fp32, because the C++ kernels are not available: {reason}"
    chosen = "chosen as the fastest that keeps the model's likelihood" if settings.quantisation == "auto" else "as set"
    return f"numbers {quantisation}, {chosen}"


def _kernel_attention(threads: int) -> type[AttentionBackend]:
    """The C++ attention backend, built and checked. Raises: KernelUnavailableError with the reason."""
    from mxn.attention.paged import PagedCpuAttention

    return PagedCpuAttention


def _quantise(model: torch.nn.Module, *, threads: int) -> str:
    from mxn.runner.quantise import quantise_int8

    return str(quantise_int8(model, threads=threads))


def _check_settings(settings: LoadSettings) -> None:
    for name, found, available in (
        ("quantisation", settings.quantisation, QUANTISATIONS),
        ("attention", settings.attention, ATTENTIONS),
    ):
        if found not in available:
            raise ConfigError(f'{name} "{found}" is not offered by the cpu backend; available: {", ".join(available)}')
    if settings.threads is not None and settings.threads < 1:
        raise ConfigError(f"threads must be at least 1, got {settings.threads}")
    if settings.options:
        raise ConfigError(f"the cpu backend has no options, got {', '.join(name for name, _ in settings.options)}")


def _check_memory(model: Model, plan: LoadPlan, free: int) -> None:
    """Refuses weights that cannot fit before minutes are spent on reading them."""
    num_weights = count_weights(check_weight_files(model.folder))
    needed = num_weights * plan.dtype.itemsize
    if needed > free:
        smaller = "" if plan.dtype is torch.bfloat16 else "; bf16 would take half of that"
        raise OutOfMemoryError(
            f"{model.name} needs {needed / _GIB:.1f} GiB for {num_weights / 1e9:.2f} billion weights, "
            f"{free / _GIB:.1f} GiB is free{smaller}"
        )
