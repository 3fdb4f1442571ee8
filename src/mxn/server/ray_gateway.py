"""The gateway of one node of a Ray cluster: the same application as elsewhere, in a replica of Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from mxn.errors import BackendError, UnavailableError
from mxn.fleet.fleet import Fleet
from mxn.fleet.launchers.ray.group import ReplicaGroup
from mxn.fleet.launchers.ray.joining import fleet_spec
from mxn.fleet.launchers.ray.link import RayLauncher
from mxn.server.app import build_app
from mxn.server.run import serve
from mxn.server.settings import ServerSettings

log = logging.getLogger(__name__)


class FrontDoor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a gateway listens, and its settings. Gateways of nodes that share a host share the port."""

    host: str
    port: int
    settings: ServerSettings


class RayGateway:
    """Serves over HTTP what the replicas on the cluster serve. The names of its methods are those that Serve calls."""

    def __init__(self, front: dict[str, Any]) -> None:
        """front: a `FrontDoor` as plain values."""
        self._front = msgspec.convert(front, FrontDoor)
        self._fleet: Fleet | None = None
        self._serving: asyncio.Task[int] | None = None
        self._stop = asyncio.Event()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Goes over to other replica groups without closing the door; opens it the first time."""
        groups = msgspec.convert(config["groups"], list[ReplicaGroup])
        spec = await asyncio.to_thread(fleet_spec, groups)
        if self._fleet is not None:
            await self._fleet.supervisor.apply(lambda avoided: spec)
            return
        self._fleet = Fleet(spec, RayLauncher())
        self._fleet.supervisor.start()
        front = self._front
        opened: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        app = build_app(self._fleet, front.settings)
        self._serving = asyncio.create_task(
            serve(app, front.host, front.port, on_started=opened.set_result, stop=self._stop, is_shared=True)
        )
        either: set[asyncio.Future[Any]] = {self._serving, opened}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not opened.done():
            raise BackendError(f"the gateway could not be opened: {self._serving.exception()}")
        log.info("gateway at %s", opened.result())

    def check_health(self) -> None:
        """Raises when nobody is answered here any more."""
        if self._serving is not None and self._serving.done():
            raise UnavailableError("the gateway has closed")

    async def __del__(self) -> None:  # Serve awaits it when it stops a replica
        """Drains: turns new work away, lets what runs finish."""
        self._stop.set()
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._fleet is not None:
            await self._fleet.stop(self._front.settings.drain_s)
