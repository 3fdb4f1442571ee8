"""Keeps one placement running: starts its replica, starts it again when it ends or hangs, drains and stops it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from mxn.engine.messages import ReplicaState
from mxn.errors import BackendError, MxnError
from mxn.fleet.calibration.store import remember_load
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.replica import RunningReplica
from mxn.fleet.spec import DeploymentSpec, PlacementSpec, load_of

log = logging.getLogger(__name__)

SILENCE_S = 4.0
"""A replica that has said nothing for so long hangs: it is ended, and another started in its place."""

_SUSPECT_S = 2.0
"""After so long a silence it is given no new work."""

_TICK_S = 0.25


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
        self._silent_s = self._stepless_s = 0.0
        self._has_been_ready = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.placement.id

    @property
    def is_stalled(self) -> bool:
        """True when the replica has been silent for so long, or held work without a step, that it may hang."""
        is_stalled = self._silent_s >= _SUSPECT_S or self._stepless_s >= self._spec.stall_s
        return self.state == "ready" and is_stalled

    @property
    def is_ready(self) -> bool:
        """True when it takes sequences: loaded, not draining, and idle or making progress."""
        replica = self.replica
        return self.state == "ready" and replica is not None and not replica.ended.is_set() and not self.is_stalled

    @property
    def is_coming_back(self) -> bool:
        """True when it served before, does not now, and is expected to soon."""
        return self._has_been_ready and not self.is_ready and self.state in ("ready", "starting", "loading")

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
        num_failures = 0
        while True:
            started_s = time.monotonic()
            try:
                await self._run_once()
            except MxnError as error:
                self.reason = str(error)
            if self.state == "draining":
                return
            log.error("%s: %s", self.id, self.reason)
            if time.monotonic() - started_s > self._spec.stall_s:
                num_failures = 0
            if not self._has_been_ready or num_failures >= len(self._spec.restart_delays_s):
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
        load = load_of(self._spec, placement)
        started_s = time.monotonic()
        replica = self.replica = await self._launcher.start(load, self._on_phase, placement.environment)
        if replica.info is not None:
            replica.info.add_launch(time.monotonic() - started_s)
        log.info("%s is ready after %.1f s", self.id, time.monotonic() - started_s)
        self._has_been_ready = True
        self._silent_s = self._stepless_s = 0.0
        if self.state == "loading":  # not when it is to end already
            self._set_state("ready", "")
        await asyncio.to_thread(remember_load, load, replica.info)
        hang = await self._watch(replica)
        if self.state == "ready":
            self._set_state("starting", hang or replica.end_reason)
        await replica.kill()
        if replica.has_lost_chip:
            self._on_chip_lost(placement, self.reason)

    async def _watch(self, replica: RunningReplica) -> str:
        """Returns when the replica has ended, or hangs; then with what is wrong.

        Silence is added up from this loop's own ticks, so time in which this process did not run hardly counts.
        """
        was_stalled = False
        heard_s, stepped_s, looked_s = replica.last_message_s, replica.last_step_s, time.monotonic()
        while not replica.ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(replica.ended.wait(), _TICK_S)
            now_s = time.monotonic()
            tick_s, looked_s = min(now_s - looked_s, 4 * _TICK_S), now_s
            if replica.last_message_s > heard_s:
                heard_s, self._silent_s = replica.last_message_s, 0.0
            else:
                self._silent_s += tick_s
            if replica.last_step_s > stepped_s or not replica.num_streams:
                stepped_s, self._stepless_s = replica.last_step_s, 0.0
            else:
                self._stepless_s += tick_s
            if self.is_stalled != was_stalled:
                was_stalled = self.is_stalled
                self._on_change()
            if self._silent_s >= SILENCE_S:
                return f"the replica hangs: it said nothing for {self._silent_s:.0f} s"
            if self._stepless_s >= self._spec.stall_s:
                return f"the replica hangs: it held work and ended no step for {self._stepless_s:.0f} s"
        return ""

    def _on_phase(self, phase: str, fraction: float) -> None:
        self.load_phase, self.load_fraction = phase, fraction

    def _set_state(self, state: ReplicaState, reason: str) -> None:
        self.state, self.reason = state, reason
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change()
