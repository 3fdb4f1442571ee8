"""OpenVINO GenAI's continuous-batching pipeline as a backend of mxn.

The pipeline has its own scheduler and KV cache, so it is described as a server: `server.py` of this package runs in the
environment that OpenVINO is installed in, and mxn launches it, watches it and speaks to it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from mxn.backends.base import Backend, Capabilities, MemoryEstimate, Probe, ServerSpec, Support
from mxn.backends.host import available_memory_bytes, cpu_chip, resident_bytes
from mxn.config.environment import cache_dir
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.energy.cpu import cpu_power_reader
from mxn.energy.reader import PowerReader
from mxn.errors import BackendError, UnsupportedModelError

PYTHON = "MXN_OPENVINO_PYTHON"
"""Variable that names the interpreter of the environment with OpenVINO; mxn's own is tried without it."""

_SERVER = Path(__file__).with_name("server.py")
_NEEDED = ("openvino-genai", "openvino-tokenizers")
_BYTES_PER_WEIGHT = {"int8": 1.0, "int4": 0.6, "fp16": 2.0}  # int4 keeps a scale for each group, and embeddings in int8
_KV_BYTES_PER_ELEMENT = 1.0  # the CPU plugin keeps keys and values in 8 bits
_GIB = 1 << 30


class OpenVinoBackend(Backend):
    """OpenVINO on the host's processor. Options: python, ir (a folder that is exported already)."""

    name = "openvino"
    api_version = 1

    def probe(self) -> Probe:
        python = _python("")
        versions = _versions(python) if python else {}
        missing = [package for package in _NEEDED if package not in versions]
        if python is None or missing:
            what = f"{' and '.join(missing)} not installed for {python}" if python else f"{PYTHON} names no program"
            install = f"pip install {' '.join(_NEEDED)} 'optimum-intel[openvino]' in an environment of its own"
            reason = f"{what}; {install}, and name its python in {PYTHON}"
            return Probe(state="absent", reason=reason, versions=versions)
        return Probe(state="active", reason=f"OpenVINO GenAI for {python}", versions=versions)

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
            quantisations=tuple(_BYTES_PER_WEIGHT),
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        return Support(
            verdict="yes",
            reasons=("optimum says when it exports the model whether it knows the architecture",),
            quantisations=tuple(_BYTES_PER_WEIGHT),
            max_context=model.max_context,
        )

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        width = _BYTES_PER_WEIGHT.get(_quantisation(settings), 1.0)
        unknown = Quantity.unavailable("B", "not measured yet")
        weights = unknown
        if model.num_parameters is not None:
            weights = Quantity(
                value=model.num_parameters * width,
                unit="B",
                provenance=Provenance.ESTIMATED,
                source=f"parameters x {width:g} bytes",
                relative_error=0.3,
            )
        kv = Quantity(
            value=float(_kv_gib(model, settings, chip.memory_bytes) * _GIB),
            unit="B",
            provenance=Provenance.ESTIMATED,
            source="whole GiB, as the pipeline takes them",
        )
        return MemoryEstimate(weights=weights, kv_cache=kv, activations=unknown, overhead=unknown)

    def power(self, chip: Chip) -> PowerReader:
        return cpu_power_reader(chip)

    def memory_used(self, chip: Chip, pid: int) -> Quantity:
        return resident_bytes(pid)

    def serve(self, model: Model, settings: LoadSettings, chips: Sequence[Chip]) -> ServerSpec:
        options = dict(settings.options)
        python, exported = _python(options.pop("python", "")), options.pop("ir", "")
        if options:
            raise BackendError(
                f"the openvino backend knows the options python and ir, not {', '.join(sorted(options))}"
            )
        if python is None:
            raise BackendError(f"there is no such interpreter; name one in {PYTHON} or the option python")
        quantisation = _quantisation(settings)
        if quantisation not in _BYTES_PER_WEIGHT:
            known = ", ".join(_BYTES_PER_WEIGHT)
            raise UnsupportedModelError(f"the openvino backend runs {known}; {quantisation} was asked for")
        folder = exported or str(cache_dir() / "openvino" / f"{model.revision[:24]}-{quantisation}")
        kv_gib = _kv_gib(model.spec, settings, available_memory_bytes())
        context = min(settings.context_length or model.spec.max_context, model.spec.max_context)
        threads = settings.threads or chips[0].cores
        argv = [python, str(_SERVER), "--model", model.folder, "--name", model.name, "--ir", folder]
        argv += ["--weights", quantisation, "--port", "{port}", "--kv-gib", str(kv_gib), "--threads", str(threads)]
        argv += ["--max-num-seqs", str(settings.max_num_seqs), "--max-step-tokens", str(settings.max_step_tokens)]
        argv += ["--vocab-size", str(model.spec.vocab_size)]
        argv += ["--prefix-cache"] if settings.prefix_cache else []
        return ServerSpec(
            argv=tuple(argv),
            environment=(("MXN_OPENVINO_KEY", "{key}"), ("HF_HUB_OFFLINE", "1")),
            api_key="{key}",
            model=model.name,
            extensions=(
                "ignore_eos",
                "min_p",
                "min_tokens",
                "repetition_penalty",
                "return_token_ids",
                "stop_token_ids",
                "top_k",
            ),
            refused=("logit_bias",),
            max_num_seqs=settings.max_num_seqs,
            ready_timeout_s=1800.0,  # the first start exports the model
            device=chips[0].uid,
            quantisation="as exported" if exported else quantisation,
            threads=threads,
            max_context=context,
            kv_bytes=kv_gib * _GIB,
            notes=(f"exported model in {Path(folder).name}",),
        )


def _python(given: str) -> str | None:
    """The interpreter that the server runs in: as given, else as the environment says, else mxn's own."""
    return shutil.which(given or os.environ.get(PYTHON, "") or "python3")


def _versions(python: str) -> dict[str, str]:
    """Versions of what the interpreter's environment holds, read from its files; nothing is imported."""
    packages = [str(path) for path in Path(python).parent.parent.glob("lib/python3.*/site-packages")]
    wanted = (*_NEEDED, "openvino", "optimum-intel")
    found = {d.name.replace("_", "-"): d.version for d in distributions(path=packages)}
    return {name: found[name] for name in wanted if name in found}


def _quantisation(settings: LoadSettings) -> str:
    return "int8" if settings.quantisation == "auto" else settings.quantisation


def _kv_gib(model: ModelSpec, settings: LoadSettings, free_bytes: int) -> int:
    """The cache in whole GiB, which is how the pipeline takes it: as set, rounded up, or enough for its sequences."""
    if settings.kv_bytes is not None:
        return max(1, -(-settings.kv_bytes // _GIB))
    context = min(settings.context_length or model.max_context, model.max_context)
    wanted = settings.auto_kv_tokens(context) * model.kv_bytes_per_token(_KV_BYTES_PER_ELEMENT)
    return max(1, round(min(wanted, free_bytes / 2) / _GIB))
