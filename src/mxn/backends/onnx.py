"""The ONNX backend: decoders exported once, run by plain ONNX Runtime over KV slots. Light to import."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mxn.backends.base import (
    Backend,
    Capabilities,
    Embedder,
    Executor,
    ExecutorInfo,
    KVCopy,
    LoadProgress,
    MemoryEstimate,
    Probe,
    SlotKV,
    Support,
    WarmUp,
)
from mxn.backends.encoder_embedder import EncoderEmbedder
from mxn.backends.host import available_memory_bytes, cpu_chip, resident_bytes, usable_cores
from mxn.core.batch import StepBatch, StepResult
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import PowerReader

if TYPE_CHECKING:
    from mxn.runner.onnx.load import LoadedRunner

ARCHITECTURES = ("granite", "llama", "mistral", "qwen2", "qwen3")
"""What is exported to graphs whose greedy tokens are those of transformers, as tests/backends/test_onnx.py proves."""

_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-qnn",
    "onnxruntime-cann",
    "onnxruntime-directml",
)
_QUANTISATIONS = ("int8", "int4", "fp32")
_BYTES_PER_WEIGHT = {"int4": 0.625, "int8": 1.04, "fp32": 4.0}  # with float32 scales
_LIBRARY_BYTES = 120e6  # resident size of onnxruntime, onnx and numpy after opening a small session
_AUTO_KV_SHARE = 0.5


class OnnxBackend(Backend):
    """All cores this process may use, as one chip; other chips through ONNX Runtime's providers, by name."""

    name = "onnx"

    def probe(self) -> Probe:
        versions = {}
        for package in (*_RUNTIMES, "onnx", "onnxruntime-genai"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        missing = [name for name in ("onnx",) if name not in versions]
        if not any(runtime in versions for runtime in _RUNTIMES):
            missing.insert(0, "onnxruntime")
        if missing:
            reason = f"{', '.join(missing)} not installed; install with: pip install 'mxn[onnx]'"
            return Probe(state="absent", reason=reason, versions=versions)
        exports = "" if "onnxruntime-genai" in versions else "; runs exported models, cannot export new ones"
        return Probe(state="active", reason=f"{usable_cores()} CPU cores{exports}", versions=versions)

    def chips(self) -> Sequence[Chip]:
        return (cpu_chip(),) if self.probe().state == "active" else ()

    def capabilities(self, chip: Chip) -> Capabilities:
        return Capabilities(
            kv="slots",
            has_mixed_steps=False,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=False,
            can_share_chip=True,
            dtypes=("fp32",),
            quantisations=_QUANTISATIONS,
            tasks=("generate", "embed"),
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        if model.task == "embed":
            reason = "runs the ONNX graph that comes with the model, in the numbers it holds"
            return Support(verdict="yes", reasons=(reason,), max_context=model.max_context)
        if model.architecture not in ARCHITECTURES:
            reason = f"no proven export of {model.architecture}; available: {', '.join(ARCHITECTURES)}"
            return Support(verdict="no", reasons=(reason,))
        if any(window is not None for window in model.layer_windows):
            reason = "sliding windows come out otherwise in ONNX Runtime's attention than in transformers"
            return Support(verdict="no", reasons=(reason,))
        return Support(verdict="yes", quantisations=_QUANTISATIONS, max_context=model.max_context)

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        quantisation = "int8" if settings.quantisation == "auto" else settings.quantisation
        return MemoryEstimate(
            weights=_estimate_weights(model, quantisation),
            kv_cache=_estimate_kv(model, settings, chip),
            activations=Quantity(
                value=4.0 * (_step_tokens(model, settings) * 48 * model.hidden_size + model.vocab_size),
                unit="B",
                provenance=Provenance.ESTIMATED,
                source="48 hidden layers of a full step and one row of logits, float32, as seen on one machine",
                relative_error=1.0,
            ),
            overhead=Quantity(
                value=_LIBRARY_BYTES,
                unit="B",
                provenance=Provenance.ESTIMATED,
                source="resident size of onnxruntime, onnx and numpy, seen on one machine",
                relative_error=0.5,
            ),
        )

    def power(self, chip: Chip) -> PowerReader:
        from mxn.energy.cpu import cpu_power_reader

        return cpu_power_reader(chip)

    def memory_used(self, chip: Chip, pid: int) -> Quantity:
        return resident_bytes(pid)

    def import_ahead(self) -> None:
        import mxn.runner.onnx.load  # noqa: F401

    def load(
        self, model: Model, settings: LoadSettings, chips: Sequence[Chip], progress: LoadProgress
    ) -> Executor | Embedder:
        if model.spec.task == "embed":
            from mxn.runner.onnx.embedding import load_onnx_embedding_runner

            encoder = load_onnx_embedding_runner(
                model, settings, cores=usable_cores(), free_bytes=available_memory_bytes, progress=progress
            )
            return EncoderEmbedder(encoder, settings.max_step_tokens)
        from mxn.errors import UnsupportedModelError
        from mxn.runner.onnx.load import load_onnx_runner

        support = self.supports(model.spec, chips[0])
        if support.verdict == "no":
            raise UnsupportedModelError(f"{model.name}: {support.reasons[0]}")
        loaded = load_onnx_runner(
            model, settings, cores=usable_cores(), free_bytes=available_memory_bytes, progress=progress
        )
        return OnnxExecutor(loaded, settings.max_step_tokens)


class OnnxExecutor(Executor):
    """A decoder graph over KV slots."""

    def __init__(self, loaded: LoadedRunner, max_step_tokens: int) -> None:
        runner = loaded.runner
        self._runner = runner
        self._max_step_tokens = max_step_tokens
        self.kv = SlotKV(num_slots=runner.num_slots, max_tokens=runner.max_tokens)
        self.info = ExecutorInfo(
            attention="GroupQueryAttention",
            quantisation=loaded.quantisation,
            program=f"ONNX Runtime, {loaded.provider}",
            device="cpu",
            threads=loaded.threads,
            weight_bytes=loaded.weight_bytes,
            kv_bytes=runner.kv_bytes,
            max_context=runner.max_tokens,
            vocab_size=runner.vocab_size,
            notes=loaded.notes,
        )

    def warm_up(self) -> WarmUp:
        shapes, seconds = self._runner.warm_up(self._max_step_tokens)
        return WarmUp(compiled=shapes, seconds=seconds, memory_bytes=self.info.weight_bytes + self.info.kv_bytes)

    def execute(self, batch: StepBatch) -> StepResult:
        return self._runner.execute(batch)

    def copy_kv(self, copies: Sequence[KVCopy]) -> None:
        self._runner.copy_kv([(copy.source, copy.destination, copy.num_tokens) for copy in copies])

    def close(self) -> None:
        self._runner.close()


def _step_tokens(model: ModelSpec, settings: LoadSettings) -> int:
    """Tokens of the largest step that can come."""
    context = min(settings.context_length or model.max_context, model.max_context)
    return min(settings.max_step_tokens, settings.max_num_seqs * context)


def _estimate_weights(model: ModelSpec, quantisation: str) -> Quantity:
    if model.num_parameters is None:
        return Quantity.unavailable("B", f"the number of parameters of {model.architecture} is not known")
    per_weight = _BYTES_PER_WEIGHT.get(quantisation, 4.0)
    return Quantity(
        value=model.num_parameters * per_weight,
        unit="B",
        provenance=Provenance.ESTIMATED,
        source=f"parameters x {per_weight:g} bytes",
        relative_error=0.3,
    )


def _estimate_kv(model: ModelSpec, settings: LoadSettings, chip: Chip) -> Quantity:
    if model.task == "embed":
        return Quantity(value=0.0, unit="B", provenance=Provenance.ESTIMATED, source="vectors are made without a cache")
    context = min(settings.context_length or model.max_context, model.max_context)
    per_token = model.kv_bytes_per_token(4.0)
    wanted = settings.auto_kv_tokens(context) * per_token
    budget = settings.kv_bytes if settings.kv_bytes is not None else min(wanted, _AUTO_KV_SHARE * chip.memory_bytes)
    num_slots, length = settings.divide_slots(context, int(budget // per_token))
    return Quantity(
        value=num_slots * length * per_token,
        unit="B",
        provenance=Provenance.ESTIMATED,
        source=f"{num_slots} slots of {length} tokens, float32",
    )
