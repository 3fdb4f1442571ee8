"""Chooses who computes an op on a chip: an explicit name wins, else the first registered for that chip; the choice is
visible.

A package of its own adds implementations through the entry point group `mxn.kernels`: each entry is a function that is
handed the registry. Nothing is imported before it is chosen, so a missing library costs only those who ask for it.
"""

from __future__ import annotations

import fnmatch
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from mxn_kernels.errors import KernelUnavailable
from mxn_kernels.target import Target

ENTRY_POINT_GROUP = "mxn.kernels"
OPS = (
    "write_kv",
    "paged_decode",
    "ragged_prefill",
    "shared_prefix_decode",
    "move_blocks",
    "rms_norm",
    "rope",
    "silu_mul",
    "sample",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One way to compute one op.

    load: "module:function", imported when chosen. The function takes what the op's face passes on (see `ops/<op>.py`).
    targets: patterns of target names, such as "sm_*". by_name_only: never chosen unless asked for.
    """

    op: str
    name: str
    load: str
    targets: tuple[str, ...]
    by_name_only: bool = False

    def fits(self, target: Target) -> bool:
        return any(fnmatch.fnmatchcase(target.name, pattern) for pattern in self.targets)


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs, and why."""

    implementation: Implementation
    reason: str
    run: Callable[..., Any]


class Registry:
    """Implementations by op, in order of preference: the latest registered first."""

    def __init__(self) -> None:
        self._by_op: dict[str, list[Implementation]] = {op: [] for op in OPS}
        self._choices: dict[tuple[str, str, str | None], Choice] = {}
        self._broken: dict[str, str] = {}

    @property
    def implementations(self) -> Mapping[str, tuple[Implementation, ...]]:
        """A copy: op to its implementations, the preferred ones first."""
        return MappingProxyType({op: tuple(found) for op, found in self._by_op.items()})

    @property
    def choices(self) -> Mapping[tuple[str, str, str | None], Choice]:
        """What has been chosen so far, by (op, target name, name asked for)."""
        return MappingProxyType(dict(self._choices))

    def register(self, implementation: Implementation, *, replace: bool = False) -> None:
        """Adds one. Raises: ValueError if the op is unknown or the name is taken and `replace` is not set."""
        if implementation.op not in self._by_op:
            raise ValueError(f"no op is named {implementation.op!r}; ops: {', '.join(OPS)}")
        if not implementation.targets or ":" not in implementation.load:
            raise ValueError(f'{implementation} needs targets and load="module:function"')
        others = self._by_op[implementation.op]
        taken = [other for other in others if other.name == implementation.name]
        if taken and not replace:
            raise ValueError(
                f"{implementation.op} has an implementation {implementation.name!r} already: {taken[0].load}"
            )
        self._by_op[implementation.op] = [implementation, *(other for other in others if other not in taken)]
        self._choices.clear()

    def select(self, op: str, target: Target, name: str | None = None) -> Choice:
        """Args: name: an implementation's name, None for the first that fits the target.

        Raises: KernelUnavailable if none fits or the chosen one cannot be imported; ValueError on an unknown op or
        name.
        """
        key = (op, target.name, name)
        if key not in self._choices:
            self._choices[key] = self._choose(op, target, name)
        return self._choices[key]

    def load_entry_points(self) -> None:
        """Lets installed packages register theirs. One that fails is left out, logged, and named in later errors."""
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            try:
                entry.load()(self)
            except Exception as fault:
                self._broken[entry.name] = f"{type(fault).__name__}: {fault}"
                _log.warning("kernels of %s (%s) cannot be used: %s", entry.name, entry.value, fault)

    def describe(self, op: str) -> str:
        """What is registered for an op, in one line."""
        rows = [
            f"{i.name} ({', '.join(i.targets)}{'; by name only' if i.by_name_only else ''})" for i in self._by_op[op]
        ]
        rows += [f"{name} failed to load ({fault})" for name, fault in self._broken.items()]
        return "; ".join(rows) or "none"

    def _choose(self, op: str, target: Target, name: str | None) -> Choice:
        if op not in self._by_op:
            raise ValueError(f"no op is named {op!r}; ops: {', '.join(OPS)}")
        if name is None:
            found = next((i for i in self._by_op[op] if i.fits(target) and not i.by_name_only), None)
            reason = "first registered for the target"
            if found is None:
                raise KernelUnavailable(
                    f"{op} has no implementation for target {target.name}; registered: {self.describe(op)}"
                )
        else:
            found = next((i for i in self._by_op[op] if i.name == name), None)
            reason = "asked for by name"
            if found is None:
                raise ValueError(f"{op} has no implementation named {name!r}; registered: {self.describe(op)}")
            if not found.fits(target):
                raise KernelUnavailable(f"{op}: {name} does not run on {target.name}; registered: {self.describe(op)}")
        module, _, function = found.load.partition(":")
        try:
            run = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as fault:
            raise KernelUnavailable(f"{op}: {found.name} cannot be imported from {found.load}: {fault}") from fault
        _log.info("%s on %s runs %s: %s", op, target.name, found.name, reason)
        return Choice(found, reason, run)


def registry() -> Registry:
    """The registry that the ops use, with everything installed packages brought."""
    global _registry
    if _registry is None:
        found = Registry()
        for op in OPS:
            reference = f"mxn_kernels.ops.{op}:{op}_reference"
            found.register(Implementation(op=op, name="reference", load=reference, targets=("*",), by_name_only=True))
            found.register(
                Implementation(
                    op=op, name="triton", load=f"mxn_kernels.triton.{op}:{op}", targets=("sm_*", "gfx*", "interpreter")
                )
            )
        for name, module, targets in (
            ("flashinfer", "flashinfer_attention", ("sm_*",)),
            ("flash-attention-3", "flash_attention", ("sm_90",)),
        ):
            load = f"mxn_kernels.{module}:ragged_prefill"
            found.register(
                Implementation(op="ragged_prefill", name=name, load=load, targets=targets, by_name_only=True)
            )
        found.load_entry_points()
        _registry = found
    return _registry


def select(op: str, target: Target, name: str | None = None) -> Callable[..., Any]:
    """The function that computes `op` on `target`; see `Registry.select`."""
    return registry().select(op, target, name).run


_registry: Registry | None = None
