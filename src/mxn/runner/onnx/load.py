"""How a model is loaded into ONNX Runtime: graph, provider, slots and threads, each choice with a note."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import onnxruntime as ort

from mxn.core.model import LoadSettings, Model
from mxn.errors import ConfigError, OutOfMemoryError
from mxn.runner.neighbours import watch_others
from mxn.runner.onnx.graph import DecoderGraph, read_graph
from mxn.runner.onnx.runner import DecodeProgram, OnnxRunner, slot_bytes
from mxn.runner.onnx.session import PROVIDERS, check_provider, open_session
from mxn.store.graphs import GraphOptions, exported_graph

QUANTISATIONS = ("auto", "int4", "int8", "fp32")
_TARGETS = {"cuda": "cuda", "tensorrt": "cuda", "directml": "dml"}
_BLOCK_SIZES = ("auto", "16", "32", "64", "128", "256")
_AUTO_BLOCK_SIZES = {"int4": 32, "int8": 128}
MAX_OTHERS_TO_SPIN = 0.25
"""Share of the cores' time that other processes may take for threads to spin; see benchmarks/NOTES.md."""
_WATCH_S = 0.2
_KV_SHARE = 0.5
"""Of the free memory for an "auto" KV cache, as for the cpu backend."""
_SPARE = 1.2
"""Room that a session needs beyond its graph's weights: they are packed again for the processor."""
_GIB = 2**30

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class LoadedRunner:
    """A runner and what was chosen for it."""

    runner: OnnxRunner
    quantisation: str
    provider: str
    threads: int
    weight_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """Options of a deployment on the onnx backend.

    provider: one of `PROVIDERS`. fallback: "allow" lets nodes that the provider does not take run on the CPU.
    prefill: the precision of a second graph for prompts, over the same slots, or "same".
    spinning: "on" lets compute threads wait for work in a loop, "off" asleep; "auto" is on where they have the cores to
      themselves when the model is loaded.
    block_size: weights that share a scale in int4 and int8; "auto" is 32 for int4, a GGUF file's own, and 128 for int8.
    provider_options: what else the provider is told, as `provider.KEY` options.
    """

    provider: str = "cpu"
    fallback: str = "refuse"
    prefill: str = "same"
    spinning: str = "auto"
    block_size: str = "auto"
    provider_options: dict[str, str]

    @classmethod
    def parse(cls, options: tuple[tuple[str, str], ...]) -> OnnxOptions:
        """Raises: ConfigError naming what is not known, and what is."""
        values = dict(options)
        own = {key.removeprefix("provider."): values.pop(key) for key in list(values) if key.startswith("provider.")}
        offered = {
            "provider": tuple(PROVIDERS),
            "fallback": ("refuse", "allow"),
            "prefill": ("same", "int4", "int8", "fp32"),
            "spinning": ("auto", "on", "off"),
            "block_size": _BLOCK_SIZES,
        }
        for name, value in values.items():
            if name not in offered:
                raise ConfigError(f'the onnx backend has no option "{name}"; available: {", ".join(offered)}')
            if value not in offered[name]:
                raise ConfigError(f'{name} "{value}" is not offered; available: {", ".join(offered[name])}')
        return cls(**values, provider_options=own)


def load_onnx_runner(
    model: Model, settings: LoadSettings, *, cores: int, free_bytes: Callable[[], int], progress: Progress
) -> LoadedRunner:
    """Exports what is not there yet, checks the graphs, opens sessions and makes the slots.

    Args: cores: what "auto" threads means. free_bytes: memory that may still be taken.
    """
    options = OnnxOptions.parse(settings.options)
    if settings.quantisation not in QUANTISATIONS:
        raise ConfigError(
            f'quantisation "{settings.quantisation}" is not offered by the onnx backend; '
            f"available: {', '.join(QUANTISATIONS)}"
        )
    check_provider(options.provider)
    quantisation = "int8" if settings.quantisation == "auto" else settings.quantisation
    threads = settings.threads or cores
    max_context = _max_context(model, settings)
    prefill_precision = quantisation if options.prefill == "same" else options.prefill

    notes = [
        f"numbers {quantisation}, "
        + ("chosen as the fastest that keeps the model's likelihood" if settings.quantisation == "auto" else "as set"),
        f"ONNX Runtime {ort.__version__}, {threads} compute threads",
    ]
    spins = may_spin(options.spinning, notes)
    decode = _open(model, quantisation, options, threads, spins, free_bytes, progress, notes)
    prefill = decode
    if prefill_precision != quantisation:
        prefill = _open(model, prefill_precision, options, threads, spins, free_bytes, progress, notes)
        _check_same_slots(decode.graph, prefill.graph)
        notes.append(f"prompts run on the {prefill_precision} graph, decoding on the {quantisation} graph")
    progress("kv-cache", 0.0)
    num_slots, max_tokens = _slots(decode.graph, max_context, settings, free_bytes(), notes)
    runner = OnnxRunner(decode, prefill, num_slots=num_slots, max_tokens=max_tokens)
    progress("kv-cache", 1.0)
    if options.provider != "cpu":
        notes.append("KV slots lie in host memory: a provider that computes elsewhere copies them at every step")
    graphs = {id(program): program.graph for program in (decode, prefill)}
    return LoadedRunner(
        runner=runner,
        quantisation=quantisation if prefill is decode else f"{quantisation}, prompts {prefill_precision}",
        provider=options.provider,
        threads=threads,
        weight_bytes=sum(graph.weight_bytes for graph in graphs.values()),
        notes=tuple(notes),
    )


def _open(
    model: Model,
    precision: str,
    options: OnnxOptions,
    threads: int,
    spins: bool,
    free_bytes: Callable[[], int],
    progress: Progress,
    notes: list[str],
) -> DecodeProgram:
    block_size = _AUTO_BLOCK_SIZES.get(precision, 32)
    wanted = GraphOptions(
        precision=precision,
        block_size=block_size if options.block_size == "auto" else int(options.block_size),
        target=_TARGETS.get(options.provider, "cpu"),
    )
    exported = exported_graph(model, wanted, progress=progress)
    progress(f"session {precision}", 0.0)
    graph = read_graph(exported.path, key_dim=model.spec.key_dim, value_dim=model.spec.value_dim)
    needed, free = int(graph.weight_bytes * _SPARE), free_bytes()
    if needed > free:
        raise OutOfMemoryError(
            f"{model.name} needs {needed / _GIB:.2f} GiB for its {precision} graph, {free / _GIB:.2f} GiB is free"
        )
    session, where = open_session(
        graph,
        provider=options.provider,
        threads=threads,
        allow_fallback=options.fallback == "allow",
        options=options.provider_options,
        spins=spins,
    )
    progress(f"session {precision}", 1.0)
    notes += [f"{precision} graph by {', '.join(exported.facts)}", where]
    return DecodeProgram(session=session, graph=graph, name=precision)


def may_spin(wanted: str, notes: list[str]) -> bool:
    """Whether compute threads spin: as wanted, or by what others take of the cores now."""
    if wanted != "auto":
        return wanted == "on"
    share = watch_others()
    time.sleep(_WATCH_S)
    taken = share()
    how = "spin" if taken <= MAX_OTHERS_TO_SPIN else "sleep"
    notes.append(f"threads {how} while they wait: other processes took {taken:.0%} of the cores (option spinning)")
    return taken <= MAX_OTHERS_TO_SPIN


def _max_context(model: Model, settings: LoadSettings) -> int:
    limit = model.spec.max_context
    if settings.context_length is not None and settings.context_length > limit:
        raise ConfigError(f"context_length {settings.context_length} is over the {limit} tokens {model.name} can hold")
    return settings.context_length or limit


def _slots(
    graph: DecoderGraph, max_context: int, settings: LoadSettings, free: int, notes: list[str]
) -> tuple[int, int]:
    """(slots, tokens of each), as many as the KV budget holds and sequences may run."""
    per_token = slot_bytes(graph, 1)
    wanted = settings.auto_kv_tokens(max_context) * per_token
    budget = settings.kv_bytes if settings.kv_bytes is not None else min(int(_KV_SHARE * free), wanted)
    source = "auto" if settings.kv_bytes is None else "set"
    num_slots, length = settings.divide_slots(max_context, budget // per_token)
    if not num_slots:
        raise OutOfMemoryError(
            f"a KV budget of {budget / _GIB:.2f} GiB ({source}) is less than one slot of {length} tokens "
            f"({length * per_token / _GIB:.2f} GiB): give kv_bytes more, or set a smaller context_length"
        )
    note = f"KV cache {num_slots * length * per_token / _GIB:.2f} GiB ({source}): {num_slots} slots of {length} tokens"
    if length < max_context:
        note += f", so that many sequences run at once; context_length up to {max_context} makes fewer and longer ones"
    elif num_slots < settings.max_num_seqs:
        note += "; so many sequences run at once, and a smaller context_length makes room for more"
    notes.append(note)
    return num_slots, length


def _check_same_slots(decode: DecoderGraph, prefill: DecoderGraph) -> None:
    if decode.caches != prefill.caches:
        raise ConfigError("the graphs for prompts and for decoding lay out their KV differently and cannot share slots")
