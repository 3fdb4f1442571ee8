"""The fit of one model on the chips here, or on one that a card describes, through every backend and format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from mxn.backends.registry import load_backend
from mxn.config.cluster import ClusterConfig, NodeConfig
from mxn.config.model_card import find_model_card, load_model_cards
from mxn.core.model import QuantisationName
from mxn.errors import ConfigError, ModelError
from mxn.fleet.calibration.store import MeasurementStore
from mxn.fleet.fit import GIB, Fit, fit_model
from mxn.fleet.inventory import take_inventory


@dataclass(frozen=True, kw_only=True, slots=True)
class FitReport:
    """One way of loading a model on one chip."""

    model: str
    chip: str
    backend: str
    quantisation: str
    context: int
    sequences: int
    fit: Fit

    @property
    def facts(self) -> dict[str, str | int]:
        """What was asked."""
        names = ("model", "chip", "backend", "quantisation", "context", "sequences")
        return {name: getattr(self, name) for name in names}

    def lines(self) -> Iterator[str]:
        """The verdict, and every part with its error and source."""
        fit = self.fit
        needed = "unknown" if fit.needed_bytes is None else f"{fit.needed_bytes / GIB:.2f}"
        most = "unknown" if fit.most_bytes is None else f"{fit.most_bytes / GIB:.2f}"
        yield (
            f"{self.model} on {self.chip} through {self.backend} as {self.quantisation}: {fit.verdict}, "
            f"{needed} GiB (at most {most}) of {fit.available_bytes / GIB:.2f}"
        )
        for name, part in fit.parts.items():
            if part.value is None:
                yield f"  {name:<12} unknown: {part.source}"
                continue
            error = f" ± {part.relative_error:.0%}" if part.relative_error else ""
            yield f"  {name:<12} {part.value / GIB:8.3f} GiB{error}  {part.provenance}: {part.source}"
        if (loading := fit.loading) is not None and loading.value is not None:
            error = f" ± {loading.relative_error:.0%}" if loading.relative_error else ""
            yield f"  {'or, loading':<12} {loading.value / GIB:8.3f} GiB{error}  {loading.provenance}: {loading.source}"


def fit_reports(
    model: str,
    *,
    chip: str | None = None,
    context: int | None = None,
    sequences: int = 1,
    quantisation: str | None = None,
    memory_gib: float | None = None,
    store: MeasurementStore | None = None,
) -> list[FitReport]:
    """One report for each chip, backend that supports the model there, and format; corrected by what loads took.

    store: of measurements; the user's when left out.

    Raises: ModelError for a model without a card or facts; ConfigError for a chip without one, or a format not offered.
    """
    cards = load_model_cards()
    card = find_model_card(cards, model)
    spec = card.architecture.spec() if card else None
    if card is None or spec is None:
        raise ModelError(f'"{model}" has no model card with its architecture; there are: {", ".join(sorted(cards))}')
    node = NodeConfig(name="here") if chip is None else _described(chip, memory_gib)
    inventory = take_inventory(ClusterConfig(nodes=(node,)))
    tokens = min(context or spec.max_context, spec.max_context)
    seen = (store or MeasurementStore()).memory()
    reports, refusals = [], []
    for group in inventory.groups:
        kind = inventory.kinds[group.kind]
        for name in group.backends:
            support = load_backend(name).supports(spec, kind.chip)
            offered = support.quantisations
            if not offered or (quantisation is not None and quantisation not in offered):
                offers = f"{name} on {kind.name} offers {', '.join(offered)}"
                refusals.append("; ".join(support.reasons) if support.verdict == "no" else offers)
                continue
            for one in offered if quantisation is None else (quantisation,):
                found = fit_model(
                    card.architecture,
                    spec,
                    name,
                    kind.chip,
                    quantisation=cast(QuantisationName, one),
                    context=tokens,
                    sequences=sequences,
                    memory_bytes=group.memory_bytes,
                    max_num_seqs=max(64, sequences),
                    seen=seen,
                )
                reports.append(
                    FitReport(
                        model=card.name,
                        chip=kind.name,
                        backend=name,
                        quantisation=one,
                        context=tokens,
                        sequences=sequences,
                        fit=found,
                    )
                )
    if not reports:
        why = "; ".join(dict.fromkeys(refusals)) or f"no backend of mxn reaches {chip or 'any chip here'}"
        raise ConfigError(f"{card.name}: {why}")
    return reports


def _described(chip: str, memory_gib: float | None) -> NodeConfig:
    try:
        return NodeConfig(name="described", chips={chip: 1}, host_memory_gib=memory_gib)
    except ValueError:
        raise ConfigError(f'"{chip}" is no id of a chip card') from None
