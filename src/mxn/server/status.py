"""What `/readyz` and `/v1/mxn/status` tell of a fleet, as plain values."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from mxn import __version__
from mxn.server.errors import fit_to_show

if TYPE_CHECKING:
    from mxn.fleet.deployment import Deployment
    from mxn.fleet.fleet import Fleet
    from mxn.fleet.keeper import Keeper
    from mxn.server.gateway import Gateway


def fleet_status(gateway: Gateway) -> dict[str, Any]:
    """Gateway, deployments with their replicas, and chips. `now_s` is monotonic: for differences between answers."""
    deployments = gateway.fleet.deployments
    return {
        "gateway": {
            "version": __version__,
            "now_s": round(time.monotonic(), 3),
            "is_draining": gateway.is_draining,
            "num_active_requests": gateway.num_active,
        },
        "deployments": [_deployment(deployment) for deployment in deployments],
        "chips": _chips(gateway.fleet),
    }


def readiness(deployment: Deployment, *, shows_reason: bool) -> dict[str, Any]:
    """How far a deployment is. The reason may quote a log line, so it is for those with a key."""
    return {"model": deployment.name, **_progress(deployment, shows_reason=shows_reason)}


def worst_state(deployments: list[Deployment]) -> str:
    """Why nothing is ready, in one word."""
    if any(deployment.is_stalled for deployment in deployments):
        return "stalled"
    for state in ("loading", "starting", "draining", "failed"):
        if any(deployment.state == state for deployment in deployments):
            return state
    return "stopped"


def _progress(part: Deployment | Keeper, *, shows_reason: bool = True) -> dict[str, Any]:
    return {
        "is_ready": part.is_ready,
        "state": part.state,
        "is_stalled": part.is_stalled,
        "load_phase": part.load_phase,
        "load_fraction": round(part.load_fraction, 4),
        "reason": fit_to_show(part.reason) if shows_reason else "",
    }


def _deployment(deployment: Deployment) -> dict[str, Any]:
    """`replica`: how the first of the ready replicas runs; `replicas` has all.

    trouble: why it has less than it should. num_waiting: sequences that no replica has yet.
    """
    return {
        **readiness(deployment, shows_reason=True),
        "revision": deployment.model.revision,
        "architecture": deployment.model.spec.architecture,
        "backend": deployment.backend,
        "chips": [{"uid": chip.uid, "kind": chip.kind, "name": chip.name} for chip in deployment.chips],
        "trouble": fit_to_show(deployment.trouble),
        "max_context": deployment.max_context,
        "num_waiting": deployment.num_waiting,
        "num_restarts": deployment.num_restarts,
        "replica": msgspec.to_builtins(deployment.info),
        "stats": msgspec.to_builtins(deployment.stats),
        "replicas": [_replica(keeper) for keeper in deployment.keepers],
    }


def _replica(keeper: Keeper) -> dict[str, Any]:
    """`stats_age_s`: how long ago its engine counted them; an idle one does every few seconds."""
    replica, placement = keeper.replica, keeper.placement
    return {
        "id": keeper.id,
        **_progress(keeper),
        "num_restarts": keeper.num_restarts,
        "backend": placement.backend,
        "chips": [chip.uid for chip in placement.chips],
        "why": fit_to_show(placement.why),
        "settings": msgspec.to_builtins(placement.settings),
        "info": msgspec.to_builtins(replica.info) if replica is not None else None,
        "stats": msgspec.to_builtins(replica.stats) if replica is not None else None,
        "stats_age_s": round(time.monotonic() - replica.last_message_s, 3) if replica is not None else None,
    }


def _chips(fleet: Fleet) -> list[dict[str, Any]]:
    """Every chip that a replica is on or that is kept free, with who is there and what meters it."""
    supervisor = fleet.supervisor
    chips: dict[str, dict[str, Any]] = {}

    def entry_of(uid: str, name: str = "", kind: str | None = None) -> dict[str, Any]:
        state = "lost" if uid in supervisor.lost else "cordoned" if uid in supervisor.cordoned else "ok"
        reason = fit_to_show(supervisor.cordoned.get(uid, ""))
        facts = {"uid": uid, "name": name, "kind": kind, "state": state, "reason": reason}
        return chips.setdefault(uid, {**facts, "replicas": [], "power_source": "unknown"})

    for deployment in fleet.deployments:
        for keeper in deployment.keepers:
            info = keeper.replica.info if keeper.replica is not None else None
            for chip in keeper.placement.chips:
                entry = entry_of(chip.uid, chip.name, chip.kind)
                entry["replicas"].append(keeper.id)
                if info is not None:
                    entry["power_source"] = f"{info.power_source} ({info.power_provenance})"
    for uid in supervisor.cordoned:
        entry_of(uid)
    return list(chips.values())
