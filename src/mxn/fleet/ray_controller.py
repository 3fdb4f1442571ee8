"""Keeps a Ray cluster at what `mxn.yaml` asks for: plans, deploys through Serve, watches nodes, plans again.

Serve starts, checks, restarts and scales replicas and gateways. What is left to do here is what it does not know: which
kinds of chips a deployment should be on, and that this changes when nodes come and go.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from ray import serve

from mxn.config.deployments import DeploymentsFile
from mxn.core.model import Model
from mxn.errors import BackendError, MxnError
from mxn.fleet.launchers.ray.apps import GATEWAYS, gateway_application, host_application
from mxn.fleet.launchers.ray.group import HOST, ReplicaGroup
from mxn.fleet.launchers.ray.nodes import Nodes
from mxn.fleet.ray_plan import groups_of

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_PATIENCE_S = 60.0
"""How long a replaced group is kept for the one in its place to become ready; then the old one goes all the same."""

_HANDOVER_S = 5.0
"""Time for gateways to go over to groups that have become ready, before those that they replace are stopped."""


class RayController:
    """What runs on the cluster for one file.

    groups: by Serve application. shortfalls: by deployment, why it has fewer replicas than it should.
    """

    def __init__(
        self,
        file: DeploymentsFile,
        fetch: Callable[[str], Model],
        gateway: Any,
        front: dict[str, Any],
        *,
        drain_s: float,
    ) -> None:
        """gateway: class of the gateways, which Serve makes with `front`."""
        self.groups: dict[str, ReplicaGroup] = {}
        self.shortfalls: dict[str, str] = {}
        self._file, self._fetch = file, fetch
        self._gateway, self._front, self._drain_s = gateway, front, drain_s
        self._nodes = Nodes()
        self._seen: frozenset[str] = frozenset()
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Makes a first plan and asks Serve for it. Raises: MxnError when nothing of it can be."""
        await asyncio.to_thread(serve.start, proxy_location="Disabled")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # which `start` sets to INFO
        await self._plan()
        if not self.groups:
            raise BackendError("; ".join(self.shortfalls.values()) or "the file names no deployment")

    async def keep(self) -> None:
        """Plans again whenever nodes have come or gone. Never returns."""
        while True:
            await asyncio.sleep(_LOOK_S)
            nodes = frozenset(await self._nodes.alive())
            if nodes != self._seen:
                log.info("%d nodes are alive, %d were", len(nodes), len(self._seen))
                try:
                    await self._plan()
                except MxnError as error:
                    log.error("the old plan is kept: %s", error)

    async def stop(self) -> None:
        """Takes the gateways away, then the replicas; running requests finish."""
        for task in self._leaving:
            task.cancel()
        await asyncio.to_thread(serve.delete, GATEWAYS)
        await asyncio.gather(*(asyncio.to_thread(serve.delete, app) for app in self.groups))

    async def failures(self) -> dict[str, str]:
        """By Serve application, why Serve gave up starting its replicas; empty while it has not."""
        status = await asyncio.to_thread(serve.status)
        return {
            name: _cause(app)
            for name, app in status.applications.items()
            if (name in self.groups or name == GATEWAYS) and app.status.value == "DEPLOY_FAILED"
        }

    async def num_running(self) -> dict[str, int]:
        """By Serve application, how many replicas run."""
        status = await asyncio.to_thread(serve.status)
        return {
            name: app.deployments[HOST].replica_states.get("RUNNING", 0)
            for name, app in status.applications.items()
            if name in self.groups and HOST in app.deployments
        }

    async def _plan(self) -> None:
        """Goes over to a plan for the nodes that are alive: new groups first, old ones go once those are ready."""
        self._seen = frozenset(await self._nodes.alive())
        reports = await self._nodes.reports()
        groups, self.shortfalls = await asyncio.to_thread(groups_of, self._file, reports, self._fetch)
        for name, reason in self.shortfalls.items():
            log.warning("%s is short of replicas: %s", name, reason)
        placed = {group.deployment for group in groups}
        stranded = [group for group in self.groups.values() if group.deployment not in placed]
        wanted = {group.app: group for group in (*stranded, *groups)}  # chips of those may come back
        old = {app: group for app, group in self.groups.items() if app not in wanted}
        new = [group for group in wanted.values() if self.groups.get(group.app) != group]
        self.groups = wanted
        await asyncio.to_thread(_deploy, [(g.app, host_application(g, self._drain_s)) for g in new])
        await self._tell_gateways([*wanted.values(), *old.values()])
        if old:
            task = asyncio.create_task(self._let_go(old, [group.app for group in new]))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _tell_gateways(self, groups: Sequence[ReplicaGroup]) -> None:
        """One gateway on every node; what they are joined to changes without closing a door."""
        app = gateway_application(
            self._gateway,
            self._front,
            [msgspec.to_builtins(group) for group in groups],
            num_nodes=len(self._seen),
            drain_s=self._drain_s,
        )
        await asyncio.to_thread(_deploy, [(GATEWAYS, app)])

    async def _let_go(self, old: dict[str, ReplicaGroup], new: list[str]) -> None:
        give_up_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < give_up_s:
            running = await self.num_running()
            if all(running.get(app, 0) for app in new):
                break
            await asyncio.sleep(_LOOK_S)
        await asyncio.sleep(_HANDOVER_S)
        await self._tell_gateways(list(self.groups.values()))
        for app in old:
            if app not in self.groups:
                await asyncio.to_thread(serve.delete, app)


def _deploy(apps: Sequence[tuple[str, Any]]) -> None:
    if apps:
        targets = [serve.RunTarget(target=app, name=name, route_prefix=None) for name, app in apps]
        serve.run_many(targets, wait_for_applications_running=False)


def _cause(app: Any) -> str:
    """What a person can use of Serve's message: the last line of the newest error."""
    texts = [d.message for d in app.deployments.values() if d.message] or [app.message]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray Serve gives no reason"
