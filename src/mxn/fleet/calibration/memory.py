"""Memory that loads were seen to take, and the correction of estimates that follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, cast

import msgspec

from mxn import __version__
from mxn.backends.base import MemoryEstimate
from mxn.backends.registry import load_backend
from mxn.core.model import QuantisationName
from mxn.core.quantity import Provenance, Quantity
from mxn.engine.messages import Load, ReplicaInfo
from mxn.errors import ConfigError

_LEAST_ERROR = 0.1
"""Of what was seen: serving adds to what a load takes, and loads of one cell differ (benchmarks/fit_grid.py)."""
_OTHER_VERSION_ERROR = 0.25
"""Added when only loads with other versions were seen."""

Amount = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryObservation:
    """What one load took, and what was expected of it.

    family: the model's architecture. resident_bytes: after warming up, by the backend's own meter, the KV cache not
    counted as far as that is known. weight_bytes, kv_bytes: as the replica reports them. peak_bytes: the most that was
    held while it loaded; None where nobody looked. estimated_*: the backend's estimate for the same load.
    """

    family: str
    chip: str
    backend: str
    versions: str
    quantisation: str
    weight_bytes: Amount
    resident_bytes: Amount
    estimated_weight_bytes: Amount
    estimated_other_bytes: Amount
    kv_bytes: Amount = 0.0
    peak_bytes: Amount | None = None
    estimated_peak_bytes: Amount | None = None

    @property
    def cell(self) -> str:
        """What observations are counted by."""
        return "|".join((self.family, self.chip, self.backend, self.versions, self.quantisation))

    @property
    def factor(self) -> float:
        """All that stays, against what was expected of it."""
        return self.resident_bytes / (self.estimated_weight_bytes + self.estimated_other_bytes)

    @property
    def other_factor(self) -> float:
        """The same beside the weights: libraries, activations, kernels."""
        return max(0.0, self.resident_bytes - self.weight_bytes) / max(1.0, self.estimated_other_bytes)

    def json(self) -> str:
        """As it is stored."""
        return msgspec.json.encode(self).decode()


def observe(load: Load, info: ReplicaInfo) -> MemoryObservation | None:
    """What a load showed; None where nothing metered it, or tokens are made up and so is the memory.

    A processor's meter counts memory that was touched, and of a fresh cache that is little; a driver counts what is
    reserved.
    """
    backend, chip = load_backend(load.backend), load.chips[0]
    if info.memory_bytes is None or not info.weight_bytes or backend.capabilities(chip).is_scripted:
        return None
    cache = 0 if chip.uid.startswith("cpu") else info.kv_bytes or 0
    estimate = backend.estimate(
        load.model.spec, replace(load.settings, quantisation=cast(QuantisationName, info.quantisation)), chip
    )
    if estimate.weights.value is None:
        return None
    return MemoryObservation(
        family=load.model.spec.architecture,
        chip=chip.name,
        backend=load.backend,
        versions=versions_text({"mxn": __version__, **backend.probe().versions}),
        quantisation=info.quantisation,
        weight_bytes=float(info.weight_bytes),
        resident_bytes=max(0.0, info.memory_bytes - cache),
        estimated_weight_bytes=estimate.weights.value,
        estimated_other_bytes=(estimate.activations.value or 0.0) + (estimate.overhead.value or 0.0),
        kv_bytes=float(info.kv_bytes or 0),
        peak_bytes=info.load_peak_bytes,
        estimated_peak_bytes=estimate.loading.value if estimate.loading else None,
    )


def read_observation(text: str, name: str) -> MemoryObservation:
    """A stored observation. Raises: ConfigError naming the field at fault."""
    try:
        return msgspec.json.decode(text, type=MemoryObservation)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name}: {error}") from error


def versions_text(versions: Mapping[str, str]) -> str:
    """Versions as one word, to be compared."""
    return ",".join(f"{name}={version}" for name, version in sorted(versions.items()))


def corrected(
    estimate: MemoryEstimate,
    observations: Sequence[MemoryObservation],
    *,
    family: str,
    chip: str,
    backend: str,
    versions: str,
    quantisation: str,
) -> MemoryEstimate:
    """The estimate, its weights and its rest corrected by what loads on the same chip through the same backend took.

    Weights and overhead go by the factor seen for the model's family and format; without any, overhead goes by the
    one seen for the backend. Activations stay as they were: serving adds them to what was seen after loading. What
    loading holds has a factor of its own. Loads with these versions count
    alone when there are any; otherwise others do, with wider error bars. Of those that count, the half with the smaller
    caches does, since how much of a cache was touched is not known. Nothing seen: the estimate as it was.
    """
    here = [one for one in observations if one.chip == chip and one.backend == backend]
    same = [one for one in here if one.versions == versions]
    chosen, widened = (same, 0.0) if same else (here, _OTHER_VERSION_ERROR)
    alike = [one for one in chosen if one.family == family and one.quantisation == quantisation]
    weights = [one.factor for one in _clear(alike)]
    rest = weights or [one.other_factor for one in _clear(chosen)]
    peaks = [one.peak_bytes / one.estimated_peak_bytes for one in alike if one.peak_bytes and one.estimated_peak_bytes]
    return MemoryEstimate(
        weights=_scaled(estimate.weights, weights, widened),
        kv_cache=estimate.kv_cache,
        activations=estimate.activations,
        overhead=_scaled(estimate.overhead, rest, widened),
        loading=_scaled(estimate.loading, peaks, widened) if estimate.loading else None,
    )


def _clear(observations: Sequence[MemoryObservation]) -> Sequence[MemoryObservation]:
    """The half with the smaller caches."""
    return sorted(observations, key=lambda one: one.kv_bytes)[: (len(observations) + 1) // 2]


def _scaled(quantity: Quantity, factors: Sequence[float], widened: float) -> Quantity:
    """The quantity times the median of the factors; as it was when there are none."""
    if quantity.value is None or not factors:
        return quantity
    factor = statistics.median(factors)
    error = max(_LEAST_ERROR, max(factors) / factor - 1 if factor else 1.0)
    versions = " with other versions" if widened else ""
    return Quantity(
        value=quantity.value * factor,
        unit=quantity.unit,
        provenance=Provenance.ESTIMATED,
        source=f"{quantity.source}; times {factor:.2f} as seen in {len(factors)} loads{versions}",
        relative_error=error + widened,
    )
