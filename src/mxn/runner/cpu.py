"""How a model is loaded on a CPU: number format, attention backend and threads, each choice with a note."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from mxn.attention.base import AttentionBackend
from mxn.attention.reference import ReferenceAttention
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.errors import ConfigError, KernelUnavailableError, OutOfMemoryError, UnsupportedModelError
from mxn.runner.attention_check import disagreement
from mxn.runner.forward import ForwardProgram, ModuleForward
from mxn.runner.loading import LoadProgress, check_weight_files, count_weights
from mxn.runner.torch_runner import LoadPlan, TorchRunner, load_runner
from mxn.runner.tuning import Memory, choose, fastest, thread_counts

QUANTISATIONS = ("auto", "int8", "int4", "bf16", "fp32")
_PACKED = ("int8", "int4")

MAX_INT4_CHANGE = 0.02
"""How much the mean negative log-likelihood of the sample may grow by 4-bit weights."""

ATTENTIONS = ("auto", "cpu-cpp", "reference")
OPTIONS = {
    "kv": ("fp16", "int8"),
    "order": ("auto", "fixed"),
    "program": ("auto", "modules", "step"),
    "tune": ("auto", "off", "again"),
}
"""kv: numbers of the KV cache of attention cpu-cpp.

order: whether the last bits of a sequence's logits may depend on what else is in a step.

program: how a step is computed: as one C++ program, by transformers' modules, or as the faster of the two.

tune: whether what is "auto" is measured, or remembered from an earlier start; not at all; or measured again.
"""

_GIB = 2**30
_KV_SHARE = 0.5
"""Of the free memory for an "auto" KV cache; the rest is for activations, the page cache and other processes."""
_SPARE = 1.1
"""Room that loading needs beyond the weights themselves."""


def load_cpu_runner(
    model: Model,
    settings: LoadSettings,
    *,
    cores: int,
    free_bytes: Callable[[], int],
    progress: LoadProgress,
    memory: Memory | None = None,
) -> TorchRunner:
    """Loads a model for this process's CPU cores.

    Args: cores: threads to use at most where none are set. free_bytes: memory that may still be taken, asked before and
    after loading. memory: where measured choices are kept.
    """
    _check_settings(settings)
    threads = settings.threads or cores
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    progress("kernels", 0.0)
    choice = _Choice(settings, threads, memory or Memory(None, {}))
    plan = _plan(model, settings, threads, free_bytes, choice)
    progress("kernels", 1.0)
    _check_memory(model, plan, free_bytes())
    runner = load_runner(model, settings, plan, progress)
    runner.threads = choice.threads
    runner.notes = (*runner.notes[:-1], *choice.notes, runner.notes[-1])
    return runner


class _Choice:
    """Makes the programs of a loaded model, takes the fastest on the best number of threads, and keeps the notes."""

    def __init__(self, settings: LoadSettings, threads: int, memory: Memory) -> None:
        options = dict(settings.options)
        self.wanted, self.is_off = options.get("program", "auto"), options.get("tune") == "off"
        self.kv_dtype = options.get("kv", "fp16")
        self.is_fixed = options.get("order") == "fixed"
        self.threads, self.memory = threads, memory
        self._candidates = [threads] if settings.threads or self.is_off else thread_counts(threads)
        self._source = "as set" if settings.threads else "all cores" if self.is_off else ""
        self.notes: list[str] = []
        self.has_kernels = False

    def __call__(
        self, model: PreTrainedModel, attention: AttentionBackend, windows: Sequence[int | None]
    ) -> ForwardProgram:
        programs: list[ForwardProgram] = [self._best_program(model, attention, windows)]
        self._check_order(programs[0])
        is_open = self.wanted == "auto" and not self.is_off and not self.is_fixed
        if is_open and not isinstance(programs[0], ModuleForward):
            programs.append(ModuleForward(model, attention, windows))
        chosen, self.threads, self.notes = choose(
            programs,
            self._candidates,
            use_threads=lambda threads: _use_threads(threads, model, attention, *programs),
            attention=attention,
            memory=self._memory_of_steps(),
        )
        source = self._source or ("the fastest" if len(self._candidates) > 1 else "the only core")
        self.notes.append(f"{self.threads} compute threads, {source}")
        order = f"not fixed: {chosen.loose_order}" if chosen.loose_order else "fixed: tokens do not depend on the batch"
        self.notes.append(f"order {order}")
        return chosen

    def _check_order(self, program: ForwardProgram) -> None:
        if self.is_fixed and program.loose_order:
            detail = f" ({program.detail})" if program.detail else ""
            raise UnsupportedModelError(
                f'order "fixed" cannot be kept by {program.name}{detail}: {program.loose_order}; it needs a model with '
                'a step program; available: order "auto"'
            )

    def _memory_of_steps(self) -> Memory:
        if not self.has_kernels:
            return self.memory
        from mxn.runner.quantise import kernel_library

        return self.memory.about("machine", "model", "settings", kernels=kernel_library())

    def _best_program(
        self, model: PreTrainedModel, attention: AttentionBackend, windows: Sequence[int | None]
    ) -> ForwardProgram:
        if not self.has_kernels:
            return ModuleForward(model, attention, windows)
        from mxn.runner.program import choose_program

        return choose_program(model, attention, windows, wanted=self.wanted)


def _plan(
    model: Model, settings: LoadSettings, threads: int, free_bytes: Callable[[], int], choice: _Choice
) -> LoadPlan:
    wants_kernels = settings.quantisation in _PACKED or settings.attention == "cpu-cpp"
    missing = None
    if wants_kernels or settings.quantisation == "auto":
        missing = _kernels_missing(model.spec, threads, choice.kv_dtype)
    if missing and wants_kernels:
        raise KernelUnavailableError(f"the C++ kernels were asked for and are not available: {missing}")
    quantisation, note = _numbers(model.spec, settings, missing, choice)
    attention = settings.attention
    if attention == "auto":
        attention = "cpu-cpp" if quantisation in _PACKED else "reference"
    if attention == "cpu-cpp" and settings.block_size % 16:
        raise ConfigError(f"attention cpu-cpp needs a block_size that is a multiple of 16, got {settings.block_size}")
    choice.has_kernels = quantisation in _PACKED and attention == "cpu-cpp"
    if choice.wanted == "step" and not choice.has_kernels:
        raise ConfigError(
            f'program "step" needs quantisation int8 or int4 and attention cpu-cpp, got {quantisation} and {attention}'
        )
    if choice.is_fixed and not (choice.has_kernels and choice.wanted != "modules"):
        raise ConfigError(
            'order "fixed" needs the step program, which takes quantisation int8 or int4 and attention cpu-cpp; got '
            f'{quantisation}, {attention} and program "{choice.wanted}"'
        )
    if attention != "cpu-cpp" and choice.kv_dtype != "fp16":
        raise ConfigError(f'kv "{choice.kv_dtype}" needs attention cpu-cpp, got {attention}')

    notes = [note]
    dtype: torch.dtype | None = torch.bfloat16 if quantisation == "bf16" else torch.float32
    kv_dtype = dtype
    if quantisation in _PACKED and not _fits(model, torch.float32, free_bytes()):
        dtype = None
        notes.append("weights read in the files' own precision before quantising, to save memory")
    make_attention: Callable[..., AttentionBackend]
    block_bytes: Callable[..., int]
    if attention == "cpu-cpp":
        from mxn.attention.paged import PagedCpuAttention

        make_attention = partial(PagedCpuAttention, threads=threads, kv_dtype=choice.kv_dtype)
        block_bytes = partial(PagedCpuAttention.bytes_per_block, kv_dtype=choice.kv_dtype)
        notes.append(f"attention cpu-cpp: C++ over an {choice.kv_dtype} KV cache")
    else:
        make_attention = partial(ReferenceAttention, dtype=kv_dtype)
        block_bytes = partial(ReferenceAttention.bytes_per_block, dtype=kv_dtype)
        notes.append(f"attention reference: plain torch over a {str(kv_dtype).removeprefix('torch.')} KV cache")
    quantise = {
        "int8": partial(_quantise_int8, threads=threads),
        "int4": partial(_quantise_int4, source=model, threads=threads),
    }
    return LoadPlan(
        device="cpu",
        dtype=dtype,
        quantisation=quantisation,
        make_attention=make_attention,
        block_bytes=block_bytes,
        quantise=quantise.get(quantisation),
        make_forward=choice,
        free_bytes=lambda: int(free_bytes() * _KV_SHARE),
        threads=threads,
        notes=tuple(notes),
    )


def _numbers(spec: ModelSpec, settings: LoadSettings, missing: str | None, choice: _Choice) -> tuple[str, str]:
    """The number format, and why."""
    if settings.quantisation != "auto":
        return settings.quantisation, f"numbers {settings.quantisation}, as set"
    if missing:
        return "fp32", f"numbers fp32, because the C++ kernels are not available: {missing}"
    if choice.is_off:
        return "int8", "numbers int8, the default"
    if choice.is_fixed:
        return "int8", "numbers int8, because the order is to be fixed"
    key = ["int8", "fp32"]
    from mxn.runner.quantise import kernel_library, product_times

    memory = choice.memory.about("machine", kernels=kernel_library(), width=spec.hidden_size, threads=choice.threads)
    times = memory.recall(key)
    if times is None:
        times = product_times(spec.hidden_size, choice.threads)
        memory.keep(key, times)
    best = fastest(times)
    listed = {name: " / ".join(f"{of_case[name]:.2g}" for of_case in times.values()) for name in key}
    where = f"a linear layer of {', '.join(times)} takes {listed['int8']} ms in int8, {listed['fp32']} ms in fp32"
    return best, f"numbers {best}: {where}"


def _kernels_missing(spec: ModelSpec, threads: int, kv_dtype: str) -> str | None:
    """Why the C++ kernels cannot serve this model, or None once they are built and agree with the torch reference."""
    try:
        from mxn.attention.paged import PagedCpuAttention, prepare_cpu_kernels

        prepare_cpu_kernels()
        make = partial(PagedCpuAttention, threads=threads, kv_dtype=kv_dtype)
        return disagreement(make, spec, kv_dtype=kv_dtype)
    except (KernelUnavailableError, ImportError) as error:
        return str(error)


def _use_threads(threads: int, model: torch.nn.Module, *others: object) -> None:
    from mxn.runner.quantise import use_threads

    use_threads(threads, model, *others)


def _quantise_int8(model: PreTrainedModel, *, threads: int) -> Sequence[str]:
    from mxn.runner.quantise import quantise_int8

    return quantise_int8(model, threads=threads).lines()


def _quantise_int4(model: PreTrainedModel, *, source: Model, threads: int) -> Sequence[str]:
    """4 bits, only where they cost the model little. Raises: UnsupportedModelError with what they cost."""
    from mxn.runner.gguf_blocks import GgufBlocks
    from mxn.runner.likelihood import mean_nll, sample_ids
    from mxn.runner.quantise import quantise_int4

    ids = sample_ids(source.folder, source.spec.max_context)
    before = mean_nll(model, ids)
    blocks = GgufBlocks.beside(source.folder, model.config.to_dict())
    lines = quantise_int4(model, threads=threads, blocks=blocks).lines()
    after = mean_nll(model, ids)
    change = after / before - 1
    found = f"mean negative log-likelihood of {len(ids)} tokens of text is {before:.4f} in fp32, {after:.4f} in int4"
    if not change <= MAX_INT4_CHANGE:
        raise UnsupportedModelError(
            f"{source.name} is not offered in int4: its {found} ({change:+.1%}, served up to "
            f"{MAX_INT4_CHANGE:+.0%}); available: int8, fp32, bf16"
        )
    return [*lines, f"{found} ({change:+.1%})"]


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
