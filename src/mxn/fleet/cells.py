"""The ways to run a deployment on the chips there are, and the reason against every way that is out of the question."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mxn.backends.registry import installed_backends
from mxn.config.cluster import BackendConfig
from mxn.config.demand import LengthConfig
from mxn.config.deployments import DeploymentConfig
from mxn.config.model_card import ModelCard, Quantisation
from mxn.core.model import ModelSpec
from mxn.errors import BackendError, ConfigError
from mxn.fleet.calibration.fitting import Calibrated
from mxn.fleet.cost_model import CostModel, Engine, Missed, Prediction, calibrated_engine, engine_of
from mxn.fleet.fit import GIB, Fit, backend_named, fit_model, installed_versions
from mxn.fleet.inventory import ChipGroup, ChipKind, Inventory
from mxn.fleet.work import Shape

_PARTS_OF_A_CHIP = (0.125, 0.25, 0.5)
_NO_LOAD = (LengthConfig(share=1.0, prompt_tokens=512, output_tokens=128),)
"""Lengths assumed for a deployment whose load is not said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One replica of a model on chips of one kind through one backend. chips: a part of one, or 1, 2, 4, 8."""

    kind: str
    backend: str
    quantisation: str
    chips: float

    @property
    def name(self) -> str:
        size = f"{self.chips:g}" if self.chips >= 1 else f"1/{round(1 / self.chips)}"
        return f"{self.kind} x{size} {self.backend} {self.quantisation}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A cell that is possible. memory_bytes: of each chip that the fit was reckoned for.

    shape, engine: what the prediction was made from.
    """

    cell: Cell
    fit: Fit
    shape: Shape
    engine: Engine
    prediction: Prediction
    memory_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A cell that is not, and the first constraint it fails.

    constraint: "where", "backend", "support", "quantisation", "memory", "card", "ttft_ms", "tpot_ms".
    margin: by how much it fails, in `unit`; None where there is no amount.
    """

    kind: str
    backend: str
    quantisation: str
    chips: float
    constraint: str
    reason: str
    margin: float | None = None
    unit: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """A deployment's cells on one group of chips."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]


class CellFinder:
    """Finds cells; deployments that differ in nothing that matters here are reckoned once."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._known: dict[tuple[object, ...], Cells] = {}

    def cells(self, deployment: DeploymentConfig, card: ModelCard, group: ChipGroup) -> Cells:
        """What is possible and what is not on the group's chips. Rules about nodes and racks are left to the caller."""
        where = deployment.where
        key = (
            *(card.name, deployment.backend, deployment.quantisation, deployment.quantisations),
            *(deployment.context_length, deployment.max_num_seqs, deployment.max_step_tokens, deployment.slo),
            *(load_parts(deployment), where.chips, where.not_chips),
            *(group.kind, group.memory_bytes, group.backends, group.chips_per_node),
        )
        if key not in self._known:
            found = list(self._find(deployment, card, group))
            self._known[key] = Cells(
                candidates=tuple(cell for cell in found if isinstance(cell, Candidate)),
                rejections=tuple(cell for cell in found if isinstance(cell, Rejection)),
            )
        return self._known[key]

    def _find(self, deployment: DeploymentConfig, card: ModelCard, group: ChipGroup) -> Iterator[Candidate | Rejection]:
        kind, spec, where = self._inventory.kinds[group.kind], card.architecture.spec(), deployment.where

        def no(constraint: str, reason: str, backend: str = "any", quantisation: str = "any") -> Rejection:
            return Rejection(
                kind=kind.name,
                backend=backend,
                quantisation=quantisation,
                chips=1,
                constraint=constraint,
                reason=reason,
            )

        if (where.chips is not None and kind.name not in where.chips) or kind.name in where.not_chips:
            yield no("where", "`where` leaves this kind out")
            return
        if spec is None:
            raise ConfigError(f'the model card "{card.name}" lacks architecture facts that a plan needs')
        if kind.card is None and not self._inventory.calibration:
            reason = f'no chip card matches "{kind.chip.name}": add one under cluster.chips, with matches'
            yield no("card", f"{reason}, or measure it with `mxn calibrate`")
            return
        if not group.backends:
            yield no("backend", "no backend reaches it: declare one under cluster.backends")
        for name in group.backends:
            if deployment.backend not in ("auto", name):
                yield no("backend", f"the deployment asks for {deployment.backend}", name)
                continue
            backend = self._inventory.declared.get(name)
            offered, reason = _offer(backend or name, kind, spec)
            if not offered:
                yield no("support", reason, name)
                continue
            for quantisation in _allowed(deployment, card):
                if quantisation not in offered:
                    text = f"{name} offers {', '.join(offered)} there"
                    yield no("quantisation", text, name, quantisation)
                    continue
                yield from self._sizes(deployment, card, spec, group, kind, backend or name, quantisation)

    def _sizes(
        self,
        deployment: DeploymentConfig,
        card: ModelCard,
        spec: ModelSpec,
        group: ChipGroup,
        kind: ChipKind,
        backend: str | BackendConfig,
        quantisation: Quantisation,
    ) -> Iterator[Candidate | Rejection]:
        """A part of a chip, a chip, several: of those too small only the largest is told of."""
        name = backend if isinstance(backend, str) else backend.name
        most = 1 if isinstance(backend, str) else backend.max_chips
        shares = _can_share(backend, kind)
        sizes = [size for size in (*(_PARTS_OF_A_CHIP if shares else ()), 1, 2, 4, 8) if size <= most]
        sizes = [size for size in sizes if size <= group.chips_per_node]
        refused: Rejection | None = None
        any_fits = False
        for chips in sizes:
            found = self._reckon(deployment, card, spec, group, kind, backend, quantisation, chips)
            if isinstance(found, Candidate):
                any_fits = True
                yield found
            elif isinstance(found, Rejection):
                refused = found
        if refused is not None and not any_fits:
            yield refused
        if not sizes:
            raise BackendError(f"{name} runs on no number of chips of {kind.name}")

    def _reckon(
        self,
        deployment: DeploymentConfig,
        card: ModelCard,
        spec: ModelSpec,
        group: ChipGroup,
        kind: ChipKind,
        backend: str | BackendConfig,
        quantisation: Quantisation,
        chips: float,
    ) -> Candidate | Rejection:
        name = backend if isinstance(backend, str) else backend.name
        memory = group.memory_bytes * min(1.0, chips)

        def no(constraint: str, reason: str, margin: float | None = None, unit: str = "") -> Rejection:
            return Rejection(
                kind=kind.name,
                backend=name,
                quantisation=quantisation,
                chips=chips,
                constraint=constraint,
                reason=reason,
                margin=margin,
                unit=unit,
            )

        context = planned_context(deployment, spec)
        fit = fit_model(
            card.architecture,
            spec,
            backend,
            kind.chip,
            quantisation=quantisation,
            context=context,
            sequences=1,
            memory_bytes=memory,
            num_chips=max(1, int(chips)),
            max_num_seqs=deployment.max_num_seqs,
            max_step_tokens=deployment.max_step_tokens,
            seen=self._inventory.memory,
        )
        if fit.verdict == "unknown":
            unknown = next(part for part in fit.parts.values() if part.value is None)
            return no("memory", f"its memory cannot be reckoned: {unknown.source}")
        if fit.verdict != "fits":
            needed, there = (fit.most_bytes or 0) / GIB, fit.available_bytes / GIB
            text = f"needs up to {needed:.1f} GiB per chip at {context} tokens of context, has {there:.1f}"
            return no("memory", text, fit.missing_bytes / GIB, "GiB")
        calibrated = self._calibrated(spec, kind, backend, quantisation) if chips <= 1 else None
        engine = _engine(calibrated, kind, quantisation, chips, spec.num_layers)
        if isinstance(engine, str):
            return no("card", engine)
        shape = _shape(card, spec, fit, chips, calibrated)
        found = CostModel(shape, engine).predict(load_parts(deployment), deployment.slo, fit, deployment.max_num_seqs)
        if isinstance(found, Missed):
            text = f"{found.best:.0f} ms at best, {found.asked:.0f} asked"
            return no(found.limit, text, found.best - found.asked, "ms")
        cell = Cell(kind=kind.name, backend=name, quantisation=quantisation, chips=chips)
        return Candidate(cell=cell, fit=fit, shape=shape, engine=engine, prediction=found, memory_bytes=memory)

    def _calibrated(
        self, spec: ModelSpec, kind: ChipKind, backend: str | BackendConfig, quantisation: Quantisation
    ) -> Calibrated | None:
        """What was measured of the model on the chip, or of others; None when nothing was."""
        name = backend if isinstance(backend, str) else backend.name
        if not self._inventory.calibration:
            return None
        return self._inventory.calibration.find(
            spec,
            chip=kind.chip,
            is_here=kind.is_here,
            backend=name,
            versions=installed_versions(name) if name in _installed() else {},
            quantisation=quantisation,
        )


def load_parts(deployment: DeploymentConfig) -> tuple[LengthConfig, ...]:
    """Lengths of the deployment's requests."""
    return deployment.load.parts if deployment.load else _NO_LOAD


def planned_context(deployment: DeploymentConfig, spec: ModelSpec) -> int:
    """Tokens that a sequence may have."""
    return min(deployment.context_length or spec.max_context, spec.max_context)


def _engine(
    calibrated: Calibrated | None, kind: ChipKind, quantisation: str, chips: float, num_layers: int
) -> Engine | str:
    """The chips with what was measured of them, else with their card's rates; the reason where there is neither."""
    if calibrated is not None:
        return calibrated_engine(calibrated, kind.card, chips)
    if kind.card is None:
        return f'no chip card matches "{kind.chip.name}", and `mxn calibrate` did not measure this cell'
    return engine_of(kind.card, quantisation, chips, num_layers)


def _shape(card: ModelCard, spec: ModelSpec, fit: Fit, chips: float, calibrated: Calibrated | None) -> Shape:
    """The model as its work is reckoned: as it was loaded where that was seen, else as the fit estimates it."""
    num_chips = max(1, int(chips))
    weights, per_token = (fit.weights.value or 0.0) * num_chips, fit.kv_bytes_per_token * num_chips
    if calibrated is not None:
        weights = calibrated.weight_bytes or weights
        per_token = spec.kv_bytes_per_token(calibrated.kv_bytes_per_element)
    return Shape(
        spec=spec,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        num_experts=card.architecture.num_experts,
        num_experts_per_token=card.architecture.num_experts_per_token,
    )


def _allowed(deployment: DeploymentConfig, card: ModelCard) -> tuple[Quantisation, ...]:
    """Formats the deployment may be served in. A single choice may be one that a card does not list."""
    if deployment.quantisation != "auto":
        return (deployment.quantisation,)  # type: ignore[return-value]
    return deployment.quantisations or card.quantisations  # type: ignore[return-value]


def _offer(backend: str | BackendConfig, kind: ChipKind, spec: ModelSpec) -> tuple[tuple[str, ...], str]:
    """Formats the backend offers for the model there; none, with the reason, when it cannot run it."""
    if isinstance(backend, BackendConfig):
        return backend.quantisations, ""
    if backend not in _installed():
        return (), f"no backend is called {backend}; available: {', '.join(_installed())}"
    support = backend_named(backend).supports(spec, kind.chip)
    only_memory = support.verdict == "no" and bool(support.quantisations)  # other formats may still fit
    if support.verdict == "no" and not only_memory:
        return (), "; ".join(support.reasons)
    offered = support.quantisations or backend_named(backend).capabilities(kind.chip).quantisations
    return offered, "" if offered else "it names no formats, so nothing can be reckoned"


def _can_share(backend: str | BackendConfig, kind: ChipKind) -> bool:
    if isinstance(backend, BackendConfig):
        return backend.can_share_chip
    return backend_named(backend).capabilities(kind.chip).can_share_chip


_installed = lru_cache(maxsize=1)(installed_backends)
