"""Whether a model fits on chips: every part of the memory it takes, with where the figure comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from mxn import __version__
from mxn.backends.base import MemoryEstimate
from mxn.backends.registry import load_backend
from mxn.config.cluster import BackendConfig
from mxn.config.model_card import Architecture
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, ModelSpec, QuantisationName
from mxn.core.quantity import Provenance, Quantity
from mxn.fleet.calibration.memory import MemoryObservation, corrected, versions_text

GIB = 1 << 30
RESERVE_SHARE = 0.05
"""Of the memory, for fragmentation and what the system takes in the meantime."""
BYTES_PER_PARAMETER = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.06, "int4": 0.56}
"""Scales and zero points of int8 and int4 included."""

backend_named = cache(load_backend)
"""A backend's object, made once: finding it reads the metadata of every package that is installed."""

Verdict = Literal["fits", "may fit", "does not fit", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Memory on one chip for one replica.

    kv_cache: for the sequences asked for, at full length. kv_bytes_per_token: on one chip.
    loading: the most that is held while the model loads, before there is a KV cache; None where it is no matter.
    available_bytes: what the replica may take there.
    """

    weights: Quantity
    kv_cache: Quantity
    activations: Quantity
    overhead: Quantity
    reserve: Quantity
    kv_bytes_per_token: float
    available_bytes: float
    loading: Quantity | None = None

    @property
    def parts(self) -> dict[str, Quantity]:
        return {
            "weights": self.weights,
            "KV cache": self.kv_cache,
            "activations": self.activations,
            "overhead": self.overhead,
            "reserve": self.reserve,
        }

    @property
    def needed_bytes(self) -> float | None:
        """All parts as estimated, or what loading takes where that is more; None when one of them is unknown."""
        values = [part.value for part in self.parts.values()]
        if None in values:
            return None
        loading = self.loading.value if self.loading is not None else None
        return max(sum(value or 0.0 for value in values), (loading or 0.0) + (self.reserve.value or 0.0))

    @property
    def most_bytes(self) -> float | None:
        """The same, each part as much above its estimate as its error allows."""
        if self.needed_bytes is None:
            return None
        loading = _most(self.loading) if self.loading is not None else 0.0
        return max(sum(map(_most, self.parts.values())), loading + _most(self.reserve))

    @property
    def verdict(self) -> Verdict:
        """ "fits" holds with every error against it; a plan takes nothing less."""
        if self.needed_bytes is None or self.most_bytes is None:
            return "unknown"
        if self.most_bytes <= self.available_bytes:
            return "fits"
        return "may fit" if self.needed_bytes <= self.available_bytes else "does not fit"

    @property
    def missing_bytes(self) -> float:
        """What more memory would make it "fits"; 0 when it does."""
        return max(0.0, (self.most_bytes or 0.0) - self.available_bytes)

    @property
    def kv_room_bytes(self) -> float:
        """What the other parts surely leave for KV cache."""
        if self.most_bytes is None or self.kv_cache.value is None:
            return 0.0
        return max(0.0, self.available_bytes - sum(map(_most, self.parts.values())) + self.kv_cache.value)


def fit_model(
    architecture: Architecture,
    spec: ModelSpec,
    backend: str | BackendConfig,
    chip: Chip,
    *,
    quantisation: QuantisationName,
    context: int,
    sequences: int,
    memory_bytes: float,
    num_chips: int = 1,
    max_num_seqs: int = 64,
    max_step_tokens: int = 512,
    seen: Sequence[MemoryObservation] = (),
) -> Fit:
    """What one replica takes on each of its chips.

    Args: sequences: held at full `context` at once. memory_bytes: of one chip, or the part of it that the replica may
        have. num_chips: it is split over; weights and KV cache are divided among them. seen: what loads took before.
    """
    per_token = _kv_bytes_per_token(architecture, spec, backend, chip, quantisation)
    kv_bytes = per_token * context * sequences
    settings = LoadSettings(
        quantisation=quantisation,
        context_length=context,
        kv_bytes=max(1, int(kv_bytes)),
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_step_tokens,
    )
    if isinstance(backend, BackendConfig):
        estimate = _declared_estimate(spec, settings, backend)
    else:
        estimate = corrected(
            backend_named(backend).estimate(spec, settings, chip),
            seen,
            family=spec.architecture,
            chip=chip.name,
            backend=backend,
            versions=versions_text(installed_versions(backend)) if seen else "",
            quantisation=quantisation,
        )
    kv = Quantity(
        value=kv_bytes / num_chips,
        unit="B",
        provenance=Provenance.ESTIMATED,
        source=f"{sequences} x {context} tokens of {per_token / 1024:.4g} KiB",
    )
    return Fit(
        weights=_divided(estimate.weights, num_chips),
        kv_cache=kv,
        activations=estimate.activations,
        overhead=estimate.overhead,
        reserve=Quantity(
            value=RESERVE_SHARE * memory_bytes,
            unit="B",
            provenance=Provenance.ESTIMATED,
            source=f"{RESERVE_SHARE:.0%} of the memory, for fragmentation",
        ),
        kv_bytes_per_token=per_token / num_chips,
        available_bytes=memory_bytes,
        loading=_divided(estimate.loading, num_chips) if estimate.loading is not None else None,
    )


def _most(quantity: Quantity) -> float:
    return (quantity.value or 0.0) * (1 + (quantity.relative_error or 0.0))


def kv_bytes_per_token(architecture: Architecture, spec: ModelSpec, bytes_per_element: float) -> float:
    """Bytes of one token's KV over all layers, in latent form where the model has one."""
    if architecture.latent_kv_dim is not None:
        return spec.num_layers * architecture.latent_kv_dim * bytes_per_element
    return spec.kv_bytes_per_token(bytes_per_element)


def installed_versions(backend: str) -> dict[str, str]:
    """Versions of mxn and of the backend's libraries here: what measurements hold for."""
    return {"mxn": __version__, **_probed_versions(backend)}


@cache
def _probed_versions(backend: str) -> dict[str, str]:
    return backend_named(backend).probe().versions


def _kv_bytes_per_token(
    architecture: Architecture,
    spec: ModelSpec,
    backend: str | BackendConfig,
    chip: Chip,
    quantisation: QuantisationName,
) -> float:
    """Half precision, or float32 beside float32 weights; a backend that keeps slots is asked how large one is."""
    by_formula = kv_bytes_per_token(architecture, spec, 4.0 if quantisation == "fp32" else 2.0)
    if isinstance(backend, BackendConfig) or backend_named(backend).capabilities(chip).kv != "slots":
        return by_formula
    tokens = min(1024, spec.max_context)
    settings = LoadSettings(quantisation=quantisation, context_length=tokens, max_num_seqs=1)
    value = backend_named(backend).estimate(spec, settings, replace(chip, memory_bytes=1 << 62)).kv_cache.value
    return value / tokens if value else by_formula


def _divided(quantity: Quantity, parts: int) -> Quantity:
    if quantity.value is None or parts == 1:
        return quantity
    return Quantity(
        value=quantity.value / parts,
        unit=quantity.unit,
        provenance=quantity.provenance,
        source=f"{quantity.source}, over {parts} chips",
        relative_error=quantity.relative_error,
    )


def _declared_estimate(spec: ModelSpec, settings: LoadSettings, backend: BackendConfig) -> MemoryEstimate:
    """For a backend that only mxn.yaml knows: by the usual formulas, and the overhead it declares."""
    weights = Quantity.unavailable("B", f"the number of parameters of {spec.architecture} is not known")
    if spec.num_parameters is not None:
        width = BYTES_PER_PARAMETER[settings.quantisation]
        weights = Quantity(
            value=spec.num_parameters * width,
            unit="B",
            provenance=Provenance.ESTIMATED,
            source=f"parameters x {width:g} bytes",
            relative_error=0.1,
        )
    widest = max(6 * spec.hidden_size, spec.num_heads * (spec.key_dim + spec.value_dim))
    return MemoryEstimate(
        weights=weights,
        kv_cache=Quantity.unavailable("B", "sized by the caller"),
        activations=Quantity(
            value=8.0 * settings.max_step_tokens * widest + 14.0 * settings.max_num_seqs * spec.vocab_size,
            unit="B",
            provenance=Provenance.ESTIMATED,
            source="four hidden layers of a full step and the logits, half precision",
            relative_error=1.0,
        ),
        overhead=Quantity(
            value=backend.overhead_gib * GIB,
            unit="B",
            provenance=Provenance.DATASHEET,
            source=f'as declared for backend "{backend.name}"',
        ),
    )
