"""Keeps one placement running: starts its replica, starts it again when it ends, drains and stops it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from mxn.engine.messages import Load, ReplicaState
from mxn.errors import BackendError, MxnError
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.replica import RunningReplica
from mxn.fleet.spec import DeploymentSpec, PlacementSpec

log = logging.getLogger(__name__)


class Keeper:
    """One placement of a deployment and the replica that stands there, if any does.

    state: starting -> loading -> ready -> (draining -> stopped | starting again after its end | failed).
    reason: why it is not ready, in a person's words. load_phase, load_fraction: progress while loading.
    replica: the newest one; it may have ended.
    on_change: called after every change of `state`; must not block.
    on_chip_lost: called when the replica said that its chip is gone. The keeper goes on trying, since a new process
      may find the chip well again; who knows better removes the placement.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        placement: PlacementSpec,
        launcher: Launcher,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_chip_lost: Callable[[PlacementSpec, str], None] = lambda placement, reason: None,
    ) -> None:
        self.placement = placement
        self.state: ReplicaState = "starting"
        self.reason = ""
        self.load_phase = ""
        self.load_fraction = 0.0
        self.num_restarts = 0
        self.replica: RunningReplica | None = None
        self._spec = spec
        self._launcher = launcher
        self._on_change = on_change
        self._on_chip_lost = on_chip_lost
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.placement.id

    @property
    def is_stalled(self) -> bool:
        """True when the replica holds work and has ended no step for `stall_s`."""
        replica = self.replica
        if self.state != "ready" or replica is None or not replica.num_streams:
            return False
        return time.monotonic() - replica.last_step_s > self._spec.stall_s

    @property
    def is_ready(self) -> bool:
        """True when it takes sequences: loaded, not draining, and idle or making progress."""
        replica = self.replica
        return self.state == "ready" and replica is not None and not replica.ended.is_set() and not self.is_stalled

    @property
    def is_settled(self) -> bool:
        """True when it is not on the way to be ready any more."""
        return self.state in ("ready", "draining", "failed", "stopped")

    def start(self) -> None:
        """Begins to load, in a task of its own; `wait_until_settled` tells how it went."""
        self._task = asyncio.create_task(self._keep_running())

    async def wait_until_settled(self) -> None:
        """Returns when it is ready. Raises: BackendError with the reason when it failed or was stopped."""
        while not self.is_settled:
            await self._changed.wait()
        if self.state != "ready":
            raise BackendError(self.reason or f"{self.id} is {self.state}")

    def drain(self) -> None:
        """Takes no new sequences from now on; those that run go on."""
        if self.state != "stopped":
            self._set_state("draining", "it is shutting down")

    async def stop(self, drain_s: float) -> None:
        """Drains for at most `drain_s` seconds and ends the replica. A keeper that was stopped stays so."""
        was_ready = self.state in ("ready", "draining")
        self.drain()
        if self.replica is not None and was_ready:
            await self.replica.stop(drain_s)
        if self._task is not None:
            self._task.cancel()  # a replica that is still loading is ended by this
            await asyncio.gather(self._task, return_exceptions=True)
        self._set_state("stopped", "it was stopped")

    async def _keep_running(self) -> None:
        """Runs replicas one after another until told to stop or until too many in a row have died young."""
        has_been_ready, num_failures = False, 0
        while True:
            started_s = time.monotonic()
            try:
                await self._run_once()
                has_been_ready = True
            except MxnError as error:
                self.reason = str(error)
            if self.state == "draining":
                return
            log.error("%s: %s", self.id, self.reason)
            if time.monotonic() - started_s > self._spec.stall_s:
                num_failures = 0
            if not has_been_ready or num_failures >= len(self._spec.restart_delays_s):
                self._set_state("failed", self.reason)
                return
            self._set_state("starting", self.reason)
            await asyncio.sleep(self._spec.restart_delays_s[num_failures])
            num_failures += 1
            self.num_restarts += 1

    async def _run_once(self) -> None:
        """Starts a replica and returns when it has ended. Raises: MxnError when it could not be started."""
        self._set_state("loading", self.reason)
        placement = self.placement
        load = Load(
            backend=placement.backend,
            model=self._spec.model,
            settings=placement.settings,
            chips=list(placement.chips),
            max_waiting=self._spec.max_queue,
            chip_share=placement.chip_share,
        )
        started_s = time.monotonic()
        replica = self.replica = await self._launcher.start(load, self._on_phase, placement.environment)
        if replica.info is not None:
            replica.info.add_launch(time.monotonic() - started_s)
        log.info("%s is ready after %.1f s", self.id, time.monotonic() - started_s)
        if self.state == "loading":  # not when it is to end already
            self._set_state("ready", "")
        await replica.ended.wait()
        self.reason = replica.end_reason
        if replica.has_lost_chip:
            self._on_chip_lost(placement, self.reason)
        await replica.kill()

    def _on_phase(self, phase: str, fraction: float) -> None:
        self.load_phase, self.load_fraction = phase, fraction

    def _set_state(self, state: ReplicaState, reason: str) -> None:
        self.state, self.reason = state, reason
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change()
