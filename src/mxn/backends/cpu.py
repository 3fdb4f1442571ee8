"""The CPU backend: transformers' models in torch, by default with int8 weights and C++ kernels. Light to import."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from mxn.backends.base import Backend, Capabilities, Executor, LoadProgress, MemoryEstimate, Probe, Support
from mxn.backends.torch_executor import TorchExecutor
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import PowerReader

_NEEDED = ("torch", "transformers", "safetensors")
_QUANTISATIONS = ("int8", "fp32", "bf16")
_FEATURES = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 "
    "asimd asimddp i8mm bf16 sve sve2"
)
_BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0}
_LIBRARY_BYTES = 450e6  # resident size of torch and transformers after loading one model class
_AUTO_KV_SHARE = 0.5


class CpuBackend(Backend):
    """All cores this process may use, as one chip."""

    name = "cpu"

    def probe(self) -> Probe:
        versions, missing = {}, []
        for package in _NEEDED:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                missing.append(package)
        if missing:
            reason = f"{', '.join(missing)} not installed; install with: pip install 'mxn[cpu]'"
            return Probe(state="absent", reason=reason, versions=versions)
        return Probe(state="active", reason=f"{usable_cores()} CPU cores", versions=versions)

    def chips(self) -> Sequence[Chip]:
        if self.probe().state != "active":
            return ()
        facts = _cpu_facts()
        return (
            Chip(
                uid="cpu-0",
                kind=None,
                name=facts.pop("name"),
                vendor=facts.pop("vendor"),
                memory_bytes=available_memory_bytes(),
                cores=usable_cores(),
                features=tuple(facts.pop("features").split()),
                facts=facts,
            ),
        )

    def capabilities(self, chip: Chip) -> Capabilities:
        return Capabilities(
            kv="paged",
            has_mixed_steps=True,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=False,
            can_share_chip=True,
            dtypes=("fp32", "bf16"),
            quantisations=_QUANTISATIONS,
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        from mxn.runner.refusals import refusal_by_architecture

        reason = refusal_by_architecture(model.architecture)
        if reason is not None:
            return Support(verdict="no", reasons=(f"{model.architecture}: {reason}",))
        return Support(
            verdict="yes",
            reasons=("a self-test of the architecture decides when it is loaded",),
            quantisations=_QUANTISATIONS,
            max_context=model.max_context,
        )

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        quantisation = "int8" if settings.quantisation == "auto" else settings.quantisation
        return MemoryEstimate(
            weights=_estimate_weights(model, quantisation),
            kv_cache=_estimate_kv(model, settings, chip, quantisation),
            activations=_estimate_activations(model, settings),
            overhead=Quantity(
                value=_LIBRARY_BYTES,
                unit="B",
                provenance=Provenance.ESTIMATED,
                source="resident size of torch and transformers, seen on one machine",
                relative_error=0.5,
            ),
        )

    def power(self, chip: Chip) -> PowerReader:
        from mxn.energy.cpu import cpu_power_reader

        return cpu_power_reader(chip)

    def load(self, model: Model, settings: LoadSettings, chips: Sequence[Chip], progress: LoadProgress) -> Executor:
        from mxn.runner.cpu import load_cpu_runner

        runner = load_cpu_runner(
            model, settings, cores=usable_cores(), free_bytes=available_memory_bytes, progress=progress
        )
        return TorchExecutor(runner)


def usable_cores() -> int:
    """Cores this process may run on: its affinity, and no more than its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    return max(1, min(affinity, math.ceil(quota))) if quota else affinity


def available_memory_bytes() -> int:
    """Memory that can be taken now: what the host has free, and no more than the container's limit leaves."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None:
            available = min(available, max(0, limit - usage))
    return available


def _cgroup_cores() -> float | None:
    """CPU time quota of the container in cores, or None when there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    old_quota = _read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    old_period = _read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return old_quota / old_period if old_quota and old_period and old_quota > 0 else None


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _cpu_facts() -> dict[str, str]:
    """Name, vendor and features of the CPU, and what else tells one from another."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = {key.strip(): value.strip() for key, value in re.findall(r"^([^:\n]+):(.*)$", text, re.MULTILINE)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    facts = {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "vendor": fields.get("vendor_id") or fields.get("CPU implementer") or "unknown",
        "features": " ".join(name for name in _FEATURES.split() if name in flags),
        "machine": platform.machine(),
        "family": fields.get("cpu family", ""),
        "model": fields.get("model", ""),
        "stepping": fields.get("stepping", ""),
        "sockets": str(len(set(re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE))) or 1),
    }
    return {key: value for key, value in facts.items() if value or key == "features"}


def _estimate_weights(model: ModelSpec, quantisation: str) -> Quantity:
    if model.num_parameters is None:
        return Quantity.unavailable("B", f"the number of parameters of {model.architecture} is not known")
    if quantisation in _BYTES_PER_WEIGHT:
        size = model.num_parameters * _BYTES_PER_WEIGHT[quantisation]
        source = f"parameters x {_BYTES_PER_WEIGHT[quantisation]:g} bytes"
    else:  # the embedding table stays float32 beside the int8 output head
        table = model.vocab_size * model.hidden_size
        size = model.num_parameters + 4.0 * table
        source = "1 byte per parameter, and a float32 embedding table; while loading, 4 bytes per parameter"
    return Quantity(value=size, unit="B", provenance=Provenance.ESTIMATED, source=source, relative_error=0.2)


def _estimate_kv(model: ModelSpec, settings: LoadSettings, chip: Chip, quantisation: str) -> Quantity:
    if settings.kv_bytes is not None:
        source = "kv_bytes as set"
        return Quantity(value=settings.kv_bytes, unit="B", provenance=Provenance.ESTIMATED, source=source)
    per_token = model.kv_bytes_per_token(4.0 if quantisation == "fp32" else 2.0)
    context = min(settings.context_length or model.max_context, model.max_context)
    wanted = settings.auto_kv_tokens(context) * per_token
    return Quantity(
        value=min(wanted, _AUTO_KV_SHARE * chip.memory_bytes),
        unit="B",
        provenance=Provenance.ESTIMATED,
        source=f"auto: {settings.auto_kv_tokens(context)} tokens, at most half of the free memory",
    )


def _estimate_activations(model: ModelSpec, settings: LoadSettings) -> Quantity:
    widest = max(4 * model.hidden_size, model.num_heads * (model.key_dim + model.value_dim))
    size = 4.0 * (settings.max_step_tokens * 4 * widest + 2 * settings.max_num_seqs * model.vocab_size)
    return Quantity(
        value=size,
        unit="B",
        provenance=Provenance.ESTIMATED,
        source="four hidden layers of a full step and two sets of logits, float32",
        relative_error=1.0,
    )
