"""What changes between a plan that runs and a new one: replicas to keep, to start and to stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from mxn.errors import ConfigError
from mxn.fleet.cells import Cell
from mxn.fleet.plan import Placement, Plan
from mxn.fleet.posing import Running, option_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Replicas of one deployment in one pool. load_s: until a started one serves; None for those that are there."""

    action: Literal["keep", "start", "stop"]
    deployment: str
    replicas: int
    pool: str
    cell: str
    load_s: float | None = None


def moves(running: Running, plan: Plan) -> Iterator[Move]:
    """Every move, deployment after deployment: what to start first, so that nothing stops before it is replaced."""
    planned = {deployment.name: deployment.placements for deployment in plan.deployments}
    for name in dict.fromkeys((*planned, *running)):
        new = {_name(placement): placement for placement in planned.get(name, ())}
        old = running.get(name, {})
        for option, placement in new.items():
            more = placement.replicas - old.get(option, 0)
            if more > 0:
                yield _move("start", name, more, option, placement.load_s)
        for option in dict.fromkeys((*new, *old)):
            there, wanted = old.get(option, 0), new[option].replicas if option in new else 0
            if min(there, wanted):
                yield _move("keep", name, min(there, wanted), option)
            if there > wanted:
                yield _move("stop", name, there - wanted, option)


def read_running(path: Path) -> Running:
    """What runs, out of a plan that `mxn plan --json` printed. Raises: ConfigError when it is no such file."""
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=_Saved)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected what `mxn plan --json` prints: {error}") from error
    found: dict[str, Mapping[str, int]] = {}
    for deployment in plan.deployments:
        found[deployment.name] = {_name(placement): placement.replicas for placement in deployment.placements}
    return found


class _SavedPlacement(msgspec.Struct):
    pool: str
    kind: str
    backend: str
    quantisation: str
    chips_per_replica: float
    replicas: int


class _SavedDeployment(msgspec.Struct):
    name: str
    placements: list[_SavedPlacement]


class _Saved(msgspec.Struct):
    deployments: list[_SavedDeployment]


def _name(placement: Placement | _SavedPlacement) -> str:
    cell = Cell(
        kind=placement.kind,
        backend=placement.backend,
        quantisation=placement.quantisation,
        chips=placement.chips_per_replica,
    )
    return option_name(placement.pool, cell)


def _move(
    action: Literal["keep", "start", "stop"], name: str, replicas: int, option: str, load_s: float | None = None
) -> Move:
    pool, _, cell = option.partition(" ")
    return Move(action=action, deployment=name, replicas=replicas, pool=pool, cell=cell, load_s=load_s)
