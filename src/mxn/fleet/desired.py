"""From an `mxn.yaml` to the replicas that should run on this machine, with their parts of its chips."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from mxn.backends.base import Backend
from mxn.backends.host import resident_bytes
from mxn.backends.registry import load_backend
from mxn.config.chip_card import find_chip_card, load_chip_cards
from mxn.config.deployments import DeploymentConfig, DeploymentsFile, load_deployments
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, QuantisationName
from mxn.errors import BackendError, ConfigError
from mxn.fleet.choice import BY_NAME_ONLY, choices
from mxn.fleet.plan import Placement, PlannedDeployment, make_plan
from mxn.fleet.planner.problem import SLICES_PER_CHIP
from mxn.fleet.spec import DeploymentSpec, FleetSpec, PlacementSpec

log = logging.getLogger(__name__)

_GIB = 1 << 30
_ENDLESS = 1 << 60
_SEAT = re.compile(r"[^:]+:(\d+)(?:-(\d+))?(?: \((\d+)/\d+\))?")


@dataclass(kw_only=True, slots=True)
class Draft:
    """One replica on its way to a placement. part: of each of its chips; None for an even one."""

    config: DeploymentConfig
    model: Model
    backend: Backend
    chips: Sequence[Chip]
    settings: LoadSettings
    why: str
    part: float | None = None
    share: float = 1.0
    memory_bytes: int = 0
    planned: Placement | None = None

    @property
    def is_on_demand(self) -> bool:
        return not self.config.keep_loaded or self.config.idle_unload_s is not None


@dataclass(kw_only=True)
class Wishes:
    """What one file asks for on this machine: called with chips that may not be used, it says what should run.

    models: by the file's words for them, with their files on disk.
    pids: processes whose memory is the fleet's own, so that what they hold counts as free.
    """

    file: DeploymentsFile
    models: Mapping[str, Model]
    pids: Callable[[], Iterable[int]] = field(default=lambda: ())

    @classmethod
    def fetched(cls, file: DeploymentsFile, fetch: Callable[[str], Model]) -> Wishes:
        """With every model's files brought here. Raises: ModelError, DownloadError, ConfigError."""
        elsewhere = [node.name for node in file.cluster.nodes if node.chips != "here"]
        if elsewhere:
            raise ConfigError(
                f"cluster.nodes: {', '.join(elsewhere)} describe chips for a plan; the launcher local serves on this "
                'machine\'s own: leave nodes out, or use "launcher: ray" (`mxn plan` needs neither)'
            )
        names = dict.fromkeys(deployment.model for deployment in file.deployments)
        return cls(file=file, models={name: fetch(name) for name in names})

    def __call__(self, without: Collection[str] = ()) -> FleetSpec:
        """The replicas that should run without those chips.

        Raises: ConfigError, BackendError for what cannot run, unless `policy.fallback` says to go on without it.
        """
        shortfalls: dict[str, str] = {}
        is_planned = any(deployment.load is not None for deployment in self.file.deployments)
        planned = [d for d in self.file.deployments if is_planned and d.backend not in BY_NAME_ONLY]
        drafts = list(self._plan(planned, without, shortfalls)) if planned else []
        for config in self.file.deployments:
            if config not in planned:
                try:
                    drafts += self._choose(config, without, drafts)
                except BackendError as error:
                    self._fall_short(config, str(error), shortfalls, error)
        memory = self._share_chips(drafts, shortfalls)
        specs = [self._spec(config, drafts) for config in self.file.deployments]
        return FleetSpec(deployments=specs, memory_bytes=memory, shortfalls=shortfalls)

    # ------------------------------------------------------------------ which chips

    def _choose(self, config: DeploymentConfig, without: Collection[str], others: Sequence[Draft]) -> Iterator[Draft]:
        """As few replicas as allowed, each on the chip with the fewest on it."""
        model, settings = self.models[config.model], config.load_settings()
        found = [
            choice
            for choice in choices(config.backend, model.spec, settings, without=without)
            if _is_allowed(config, choice.chip)
        ]
        if not found:
            raise BackendError(f"{config.served_name}: `where` leaves out every chip that could run it")
        on_chip: dict[str, int] = defaultdict(int)
        for draft in others:
            for chip in draft.chips:
                on_chip[chip.uid] += 1
        for _ in range(max(1, config.replicas.min)):
            choice = min(found, key=lambda choice: on_chip[choice.chip.uid])
            on_chip[choice.chip.uid] += 1
            yield Draft(
                config=config,
                model=model,
                backend=choice.backend,
                chips=[choice.chip],
                settings=settings,
                why=choice.why,
                part=config.chip_share,
            )

    def _plan(
        self, configs: Sequence[DeploymentConfig], without: Collection[str], shortfalls: dict[str, str]
    ) -> Iterator[Draft]:
        """What the planner says for this machine's chips."""
        kinds = self._kinds(configs)
        absent = {kind: sum(chip.uid in without for chip in chips) for kind, chips in kinds.items()}
        what_if = ",".join(f"-{count} {kind}" for kind, count in absent.items() if count)
        plan = make_plan(self.file.model_copy(update={"deployments": tuple(configs)}), what_if=what_if)
        by_name = {config.served_name: config for config in configs}
        for planned in plan.deployments:
            if planned.unserved or planned.missing_replicas:
                self._fall_short(by_name[planned.name], _shortfall(planned), shortfalls)
            for placement in planned.placements:
                there = [chip for chip in kinds[placement.kind] if chip.uid not in without]
                for seat in placement.seats:
                    yield self._seated(by_name[planned.name], placement, seat, there, planned)

    def _seated(
        self,
        config: DeploymentConfig,
        placement: Placement,
        seat: str,
        there: Sequence[Chip],
        planned: PlannedDeployment,
    ) -> Draft:
        match = _SEAT.fullmatch(seat)
        if match is None:
            raise ConfigError(f'the plan seats {config.served_name} at "{seat}", which is no place on this machine')
        first, last = int(match[1]), int(match[2] or match[1])
        why = f"planned: {placement.requests_per_s:.3g} requests/s, limited by {placement.limited_by}"
        if planned.runner_up is not None:
            why += f"; {planned.runner_up.cell} would cost {planned.runner_up.cost_above:.0%} more"
        return Draft(
            config=config,
            model=self.models[config.model],
            backend=load_backend(placement.backend),
            chips=there[first : last + 1],
            settings=replace(config.load_settings(), quantisation=cast(QuantisationName, placement.quantisation)),
            why=why,
            part=config.chip_share or (int(match[3]) / SLICES_PER_CHIP if match[3] else None),
            planned=placement,
        )

    def _kinds(self, configs: Sequence[DeploymentConfig]) -> dict[str, list[Chip]]:
        """This machine's chips by the kind that the planner knows them by, in its order."""
        from mxn.backends.survey import physical_chips, survey

        cards = {**load_chip_cards(), **{card.id: card for card in self.file.cluster.chips}}
        kinds: dict[str, list[Chip]] = defaultdict(list)
        surveys = survey()
        for seen in physical_chips(surveys):
            if any(not surveys[name].is_scripted for name in seen.backends):
                card = cards.get(seen.chip.kind or "") or find_chip_card(cards, seen.chip.name)
                kinds[card.id if card else seen.chip.uid].append(seen.chip)
        return kinds

    # ------------------------------------------------------------------ parts of chips

    def _share_chips(self, drafts: list[Draft], shortfalls: dict[str, str]) -> dict[str, int]:
        """Gives every draft its part of its chips, and settings that keep to it. Returns: memory by chip.

        Models that are always loaded divide a chip; those that are loaded on demand take turns in what is left.
        """
        on_chip: dict[str, list[Draft]] = defaultdict(list)
        chips: dict[str, Chip] = {}
        for draft in drafts:
            for chip in draft.chips:
                on_chip[chip.uid].append(draft)
                chips[chip.uid] = chip
        for uid, sharing in on_chip.items():
            _divide(uid, sharing)
        memory = {uid: self._memory_of(chip) for uid, chip in chips.items()}
        for draft in list(drafts):
            is_shared = any(len(on_chip[chip.uid]) > 1 for chip in draft.chips)
            room = int((draft.part or 1.0) * min(memory[chip.uid] for chip in draft.chips))
            misfit = _settle(draft, room, is_shared=is_shared)
            if misfit is not None:
                drafts.remove(draft)
                self._fall_short(draft.config, misfit, shortfalls)
        return memory

    def _memory_of(self, chip: Chip) -> int:
        """What all replicas on a chip may take together."""
        if not chip.uid.startswith("cpu"):
            return chip.memory_bytes
        own = sum(resident_bytes(pid).value or 0.0 for pid in self.pids())
        return chip.memory_bytes + int(own)  # a CPU's figure is what is free now

    def _fall_short(
        self, config: DeploymentConfig, reason: str, shortfalls: dict[str, str], cause: BackendError | None = None
    ) -> None:
        """Raises, or notes the reason, as the file's policy says."""
        name = self._name(config)
        if self.file.policy.fallback == "refuse":
            if cause is not None:
                raise cause
            raise ConfigError(f"{name}: {reason}")
        if self.file.policy.fallback == "warn":
            log.warning("%s: %s", name, reason)
        shortfalls[name] = f"{shortfalls[name]}; {reason}" if name in shortfalls else reason

    def _name(self, config: DeploymentConfig) -> str:
        return config.name or self.models[config.model].name

    def _spec(self, config: DeploymentConfig, drafts: Iterable[Draft]) -> DeploymentSpec:
        mine = [draft for draft in drafts if draft.config is config]
        model, name = self.models[config.model], self._name(config)
        return DeploymentSpec(
            name=name,
            model=replace(model, name=name),
            placements=[_placement(f"{name}/{index}", draft) for index, draft in enumerate(mine)],
            max_queue=config.max_queue or self.file.server.max_queue,
            max_wait_s=config.max_wait_s,
            ttft_slo_s=config.slo.ttft_ms / 1e3 if config.slo.ttft_ms is not None else None,
            stall_s=config.stall_s,
            keep_loaded=config.keep_loaded,
            idle_unload_s=config.idle_unload_s,
        )


def read_wishes(path: Path, pids: Callable[[], Iterable[int]]) -> Wishes:
    """What a file asks for now, its models fetched. Raises: MxnError; for a file at fault with every fault."""
    from mxn.store.fetch import fetch

    wishes = Wishes.fetched(load_deployments(path), fetch)
    wishes.pids = pids
    return wishes


def _placement(placement_id: str, draft: Draft) -> PlacementSpec:
    planned = draft.planned
    yields = planned.tokens_per_watt if planned is not None else None
    return PlacementSpec(
        id=placement_id,
        backend=draft.backend.name,
        chips=draft.chips,
        settings=draft.settings,
        chip_share=draft.share,
        output_tokens_per_s=planned.output_tokens_per_s if planned is not None else None,
        joules_per_token=1 / yields if yields else None,
        memory_bytes=draft.memory_bytes,
        why=draft.why,
    )


def _divide(uid: str, sharing: Sequence[Draft]) -> None:
    """Settles the parts of those who share a chip, and the shares of its energy that they answer for."""
    kept = [draft for draft in sharing if not draft.is_on_demand]
    cold = [draft for draft in sharing if draft.is_on_demand]
    taken = sum(draft.part or 0.0 for draft in kept)
    turns = max((draft.part for draft in cold if draft.part is not None), default=0.0)
    open_parts = sum(draft.part is None for draft in kept) + (any(draft.part is None for draft in cold) and not turns)
    left = 1 - taken - turns
    if left < -1e-9 or (open_parts and left < 1e-9):
        names = ", ".join(dict.fromkeys(draft.config.served_name for draft in sharing))
        raise ConfigError(
            f"{uid}: the chip_share of {names} come to {taken + turns:.2f}, expected at most 1 and something left for "
            f"those without; lower them"
        )
    even = left / open_parts if open_parts else 0.0
    for draft in sharing:
        if draft.part is None:
            draft.part = even or turns
    total = sum(draft.part or 0.0 for draft in kept) + max((draft.part or 0.0 for draft in cold), default=0.0)
    for draft in sharing:
        draft.share = min(draft.share, (draft.part or 1.0) / total)


def _settle(draft: Draft, room: int, *, is_shared: bool) -> str | None:
    """Fits the KV cache into the draft's part and reckons what it takes. Returns: why it does not fit, if so."""
    chip, settings = draft.chips[0], draft.settings

    def estimate(memory_bytes: int, settings: LoadSettings) -> tuple[float, float]:
        """(KV cache, everything else) as far as they are known."""
        found = draft.backend.estimate(draft.model.spec, settings, replace(chip, memory_bytes=memory_bytes))
        rest = sum(part.value or 0.0 for part in (found.weights, found.activations, found.overhead))
        return found.kv_cache.value or 0.0, rest

    kv, rest = estimate(room, settings)
    if is_shared:
        if kv and settings.kv_bytes is None:
            wanted, _ = estimate(_ENDLESS, settings)
            if kv < wanted:  # a round figure, so that it is the same when a little more or less is free
                kv = min(kv, max(0.0, room - rest))
                kv = float(1 << (int(kv).bit_length() - 1)) if kv >= 1 else 0.0
            draft.settings = replace(settings, kv_bytes=int(kv))
        if rest + kv > room or (not kv and draft.settings.kv_bytes == 0):
            return (
                f"it needs {(rest + kv) / _GIB:.2f} GiB of {chip.uid}, its part of {draft.part or 1:.0%} is "
                f"{room / _GIB:.2f}: give it a larger chip_share, a shorter context_length, less kv_gib or a smaller "
                "quantisation"
            )
        draft.why += f"; {draft.part or 1:.0%} of {chip.uid}"
    draft.memory_bytes = min(room, int(rest + kv))
    return None


def _shortfall(planned: PlannedDeployment) -> str:
    lacks = []
    if planned.unserved:
        lacks.append(f"{planned.unserved:.0%} of its load cannot be served")
    if planned.missing_replicas:
        lacks.append(f"{planned.missing_replicas} replicas find no place")
    helps = "; ".join(planned.relaxations[:3])
    return " and ".join(lacks) + (f"; what would help: {helps}" if helps else "")


def _is_allowed(config: DeploymentConfig, chip: Chip) -> bool:
    """Whether `where` leaves the chip in: by its kind, or by its uid."""
    where, names = config.where, {chip.kind, chip.uid}
    return (where.chips is None or bool(names & set(where.chips))) and not names & set(where.not_chips)
