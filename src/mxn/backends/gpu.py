"""What the CUDA and ROCm backends share: torch runs the model, `mxn_kernels` computes attention. Light to import.

A subclass knows its vendor's management library: which boards there are, what they can do, how they measure energy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

from mxn.backends.base import Backend, Capabilities, Executor, LoadProgress, MemoryEstimate, Probe, Support
from mxn.config.environment import visible_chips
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.errors import ChipError

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
_LIBRARY_BYTES = 1.2e9
_RESERVE_SHARE = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """One chip as its vendor's library describes it.

    uuid: the vendor's, as tools and environment variables write it. pci: bus address. pci_id: "vendor:device", hex.
    target: what kernels are compiled for ("sm_90", "gfx942"). slice_of: uuid of the board a partition belongs to.
    """

    uuid: str
    name: str
    memory_bytes: int
    num_multiprocessors: int
    target: str
    pci: str = ""
    pci_id: str = ""
    slice_of: str = ""
    features: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()


class NoBoards(Exception):
    """Why a vendor's library lists nothing. is_normal: there is no such chip here; else something is wrong."""

    def __init__(self, reason: str, *, is_normal: bool) -> None:
        super().__init__(reason)
        self.is_normal = is_normal


class GpuBackend(Backend, ABC):
    """A torch device with Triton kernels. Subclasses set the class variables and list their boards."""

    vendor: ClassVar[str]
    extra: ClassVar[str]  # of `pip install mxn[...]`
    wrong_builds: ClassVar[tuple[str, ...]]  # of torch, by how their version ends
    visibility: ClassVar[tuple[str, ...]]  # environment variables that hide chips

    @abstractmethod
    def boards(self) -> Sequence[Board]:
        """All of the vendor's chips on this host, in bus order. Raises: NoBoards."""

    @abstractmethod
    def quantisations(self, target: str) -> tuple[str, ...]:
        """Number formats of weights that the chip can compute with, the default first; empty for a chip too old."""

    def probe(self) -> Probe:
        versions = {}
        for package in ("torch", "transformers", "triton"):
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                continue
        try:
            boards = self.boards()
        except NoBoards as error:
            return Probe(state="absent" if error.is_normal else "broken", reason=str(error), versions=versions)
        names = ", ".join(board.name for board in boards)
        install = f"pip install 'mxn[{self.extra}]'"
        missing = [package for package in ("torch", "transformers") if package not in versions]
        if missing:
            reason = f"{names} is here, {' and '.join(missing)} is not installed: {install}"
            return Probe(state="broken", reason=reason, versions=versions)
        build = versions["torch"].partition("+")[2]
        if build.startswith(self.wrong_builds):
            reason = f"{names} is here, but torch {versions['torch']} is a build for something else: {install}"
            return Probe(state="broken", reason=reason, versions=versions)
        if not self._visible(boards):
            hidden = " or ".join(self.visibility)
            return Probe(state="absent", reason=f"{names} is hidden by {hidden}", versions=versions)
        if "triton" not in versions:
            names += "; triton is not installed, so attention will run as plain torch"
        return Probe(state="active", reason=names, versions=versions)

    def chips(self) -> Sequence[Chip]:
        if self.probe().state != "active":
            return ()
        return tuple(self._chip(board) for board in self._visible(self.boards()))

    def capabilities(self, chip: Chip) -> Capabilities:
        offered = self.quantisations(chip.facts.get("target", ""))
        return Capabilities(
            kv="paged",
            has_mixed_steps=True,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=True,
            can_share_chip=True,
            dtypes=tuple(name for name in offered if name in ("bf16", "fp16", "fp32")),
            quantisations=offered,
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        from mxn.runner.refusals import refusal_by_architecture

        reason = refusal_by_architecture(model.architecture)
        if reason is not None:
            return Support(verdict="no", reasons=(f"{model.architecture}: {reason}",))
        target = chip.facts.get("target", "unknown")
        offered = self.quantisations(target)
        if not offered:
            return Support(
                verdict="no", reasons=(f"{chip.name} ({target}) is older than what torch and Triton run on",)
            )
        reasons = ["a self-test of the architecture, and of the kernels on the chip, decides when it is loaded"]
        if "bf16" not in offered:
            reasons.insert(0, f"{chip.name} ({target}) has no bf16, so weights are fp16, and Triton may not know it")
        weights = _weight_bytes(model, offered[0])
        if weights is not None and weights > chip.memory_bytes:
            needed, there = f"{weights / 2**30:.1f}", f"{chip.memory_bytes / 2**30:.1f}"
            reasons = [f"its weights take {needed} GiB as {offered[0]}, the chip has {there}"]
            return Support(verdict="no", reasons=tuple(reasons), quantisations=offered, max_context=model.max_context)
        return Support(
            verdict="yes" if "bf16" in offered else "degraded",
            reasons=tuple(reasons),
            quantisations=offered,
            max_context=model.max_context,
        )

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        offered = self.quantisations(chip.facts.get("target", ""))
        name = settings.quantisation if settings.quantisation != "auto" else (offered or ("bf16",))[0]
        activations = _activations(model, settings)
        weights = _weights(model, name)
        return MemoryEstimate(
            weights=weights,
            kv_cache=_kv_cache(settings, chip, weights, activations),
            activations=activations,
            overhead=Quantity(
                value=_LIBRARY_BYTES + _RESERVE_SHARE * chip.memory_bytes,
                unit="B",
                provenance=Provenance.ESTIMATED,
                source="context, libraries' workspaces and graphs, reckoned; and 2 % of the chip left alone",
                relative_error=0.5,
            ),
        )

    def load(self, model: Model, settings: LoadSettings, chips: Sequence[Chip], progress: LoadProgress) -> Executor:
        if len(chips) != 1:
            raise ChipError(f'backend "{self.name}" runs a replica on one chip, got {len(chips)}')
        from mxn.backends.torch_executor import chip_executor
        from mxn.runner.accelerator import CudaAccelerator, find_device
        from mxn.runner.gpu import load_gpu_runner

        (chip,) = chips
        accelerator = CudaAccelerator(find_device(chip.facts["uuid"], chip.facts.get("pci", "")))
        offered = self.quantisations(chip.facts["target"])
        return chip_executor(
            load_gpu_runner(model, settings, accelerator=accelerator, quantisations=offered, progress=progress)
        )

    def _visible(self, boards: Sequence[Board]) -> Sequence[Board]:
        for variable in self.visibility:
            wanted = visible_chips(variable)
            if wanted is not None:
                boards = choose_visible(boards, wanted)
        return boards

    def _chip(self, board: Board) -> Chip:
        facts = {"uuid": board.uuid, "pci": board.pci, "pci_id": board.pci_id, "target": board.target}
        facts |= {"slice_of": board.slice_of}
        return Chip(
            uid=uid_of(board.uuid),
            kind=_card_of(f"{board.name} {board.pci_id}"),
            name=board.name,
            vendor=self.vendor,
            memory_bytes=board.memory_bytes,
            cores=board.num_multiprocessors,
            features=(board.target, *board.features, *self.quantisations(board.target)),
            links=board.links,
            facts={name: value for name, value in facts.items() if value},
        )


def uid_of(uuid: str) -> str:
    """A chip's uid from its vendor's UUID: the same whatever order chips are listed in."""
    return f"gpu-{uuid.removeprefix('GPU-').lower()}"


def choose_visible(boards: Sequence[Board], wanted: Sequence[str]) -> Sequence[Board]:
    """The boards that a list of numbers or (beginnings of) UUIDs names, in its order; it ends at the first unknown one.

    Numbers count whole boards in bus order, which is the driver's own order where all boards are alike.
    """
    whole = [board for board in boards if not board.slice_of]
    chosen: list[Board] = []
    for name in wanted:
        if name.isdigit():
            found = [whole[int(name)]] if int(name) < len(whole) else []
        else:
            found = [board for board in boards if name and board.uuid.lower().startswith(name.lower())]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


@lru_cache
def _card_of(name: str) -> str | None:
    """Id of the chip card; None where no card matches, or cards cannot be read for want of pydantic."""
    try:
        from mxn.config.chip_card import find_chip_card, load_chip_cards
    except ImportError:
        return None
    card = find_chip_card(load_chip_cards(), name)
    return card.id if card else None


def _weight_bytes(model: ModelSpec, quantisation: str) -> float | None:
    if model.num_parameters is None:
        return None
    if quantisation == "int4":  # the tables at both ends stay as they are; a scale and a zero for every 64 weights
        tables = 2.0 * model.vocab_size * model.hidden_size
        return 2.0 * tables + max(0.0, model.num_parameters - tables) * (0.5 + 4 / 64)
    return model.num_parameters * BYTES_PER_WEIGHT.get(quantisation, 2.0)


def _weights(model: ModelSpec, quantisation: str) -> Quantity:
    size = _weight_bytes(model, quantisation)
    if size is None:
        return Quantity.unavailable("B", f"the number of parameters of {model.architecture} is not known")
    return Quantity(
        value=size,
        unit="B",
        provenance=Provenance.ESTIMATED,
        source=f"parameters as {quantisation}",
        relative_error=0.1,
    )


def _activations(model: ModelSpec, settings: LoadSettings) -> Quantity:
    widest = max(6 * model.hidden_size, model.num_heads * (model.key_dim + model.value_dim))
    size = 2.0 * settings.max_step_tokens * 4 * widest + 14.0 * settings.max_num_seqs * model.vocab_size
    return Quantity(
        value=size,
        unit="B",
        provenance=Provenance.ESTIMATED,
        source="four hidden layers of a full step in half precision, logits and the sampler's copies of them",
        relative_error=1.0,
    )


def _kv_cache(settings: LoadSettings, chip: Chip, weights: Quantity, activations: Quantity) -> Quantity:
    if settings.kv_bytes is not None:
        return Quantity(value=settings.kv_bytes, unit="B", provenance=Provenance.ESTIMATED, source="kv_bytes as set")
    if weights.value is None or activations.value is None:
        return Quantity.unavailable("B", "auto takes what the weights leave, and their size is not known")
    reserve = _LIBRARY_BYTES + _RESERVE_SHARE * chip.memory_bytes
    rest = max(0.0, chip.memory_bytes - weights.value - activations.value - reserve)
    return Quantity(
        value=rest, unit="B", provenance=Provenance.ESTIMATED, source="auto: all that the other parts leave"
    )
