"""The CPU backend: transformers' models in torch, by default with int8 weights and C++ kernels. Light to import."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from mxn import __version__
from mxn.backends.base import Backend, Capabilities, Embedder, Executor, LoadProgress, MemoryEstimate, Probe, Support
from mxn.backends.encoder_embedder import EncoderEmbedder
from mxn.backends.host import available_memory_bytes, cpu_chip, resident_bytes, usable_cores
from mxn.backends.torch_executor import TorchExecutor
from mxn.config.environment import cache_dir
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import PowerReader

_NEEDED = ("torch", "transformers", "safetensors")
_QUANTISATIONS = ("int8", "fp32", "bf16", "int4")
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
        return (cpu_chip(),)

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
            tasks=("generate", "embed"),
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        if model.task == "embed":
            return Support(verdict="yes", quantisations=("fp32",), max_context=model.max_context)
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
        default = "fp32" if model.task == "embed" else "int8"
        quantisation = default if settings.quantisation == "auto" else settings.quantisation
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
            loading=_estimate_loading(model, quantisation),
        )

    def power(self, chip: Chip) -> PowerReader:
        from mxn.energy.cpu import cpu_power_reader

        return cpu_power_reader(chip)

    def memory_used(self, chip: Chip, pid: int) -> Quantity:
        return resident_bytes(pid)

    def import_ahead(self) -> None:
        import mxn.runner.cpu  # noqa: F401

    def load(
        self, model: Model, settings: LoadSettings, chips: Sequence[Chip], progress: LoadProgress
    ) -> Executor | Embedder:
        if model.spec.task == "embed":
            from mxn.runner.embedding import load_embedding_runner

            encoder = load_embedding_runner(
                model, settings, cores=usable_cores(), free_bytes=available_memory_bytes, progress=progress
            )
            return EncoderEmbedder(encoder, settings.max_step_tokens)
        from mxn.runner.cpu import load_cpu_runner
        from mxn.runner.tuning import Memory

        cores, chip, options = usable_cores(), chips[0], dict(settings.options)
        tune = options.pop("tune", "auto")
        facts = {
            "machine": [chip.name, chip.features, chip.facts, cores, __version__, *self.probe().versions.values()],
            "model": model.revision,
            "settings": [settings.quantisation, settings.attention, settings.block_size, sorted(options.items())],
        }
        memory = Memory(cache_dir() / "tuning", facts, is_read=tune != "again")
        runner = load_cpu_runner(
            model,
            settings,
            cores=cores,
            free_bytes=available_memory_bytes,
            progress=progress,
            memory=memory,
        )
        return TorchExecutor(runner)


def _estimate_weights(model: ModelSpec, quantisation: str) -> Quantity:
    if model.num_parameters is None:
        return Quantity.unavailable("B", f"the number of parameters of {model.architecture} is not known")
    if quantisation in _BYTES_PER_WEIGHT:
        size = model.num_parameters * _BYTES_PER_WEIGHT[quantisation]
        source = f"parameters x {_BYTES_PER_WEIGHT[quantisation]:g} bytes"
    else:  # the embedding table stays float32 beside the int8 output head
        table = model.vocab_size * model.hidden_size
        per_weight, name = (0.625, "5 bits") if quantisation == "int4" else (1.0, "1 byte")
        size = per_weight * (model.num_parameters - table) + 5.0 * table
        source = f"{name} per parameter, and a float32 embedding table"
    return Quantity(value=size, unit="B", provenance=Provenance.ESTIMATED, source=source, relative_error=0.2)


def _estimate_loading(model: ModelSpec, quantisation: str) -> Quantity | None:
    """All but bf16 is made from float32 weights, which stand beside the file's own for a moment."""
    if model.num_parameters is None or quantisation == "bf16":
        return None
    return Quantity(
        value=_LIBRARY_BYTES + 6.0 * model.num_parameters,
        unit="B",
        provenance=Provenance.ESTIMATED,
        source="libraries, and weights in float32 beside a file of 2 bytes per parameter; a file may have more",
        relative_error=0.35,
    )


def _estimate_kv(model: ModelSpec, settings: LoadSettings, chip: Chip, quantisation: str) -> Quantity:
    if model.task == "embed":
        return Quantity(value=0.0, unit="B", provenance=Provenance.ESTIMATED, source="vectors are made without a cache")
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
