"""Starts on the same chip one after another: two models that load at once each see memory free that both will take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from mxn.engine.messages import Load
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.replica import RunningReplica


class InTurn:
    """A `Launcher` around another."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._locks: dict[str, asyncio.Lock] = {}

    async def start(
        self, load: Load, on_phase: Callable[[str, float], None], environment: Mapping[str, str]
    ) -> RunningReplica:
        async with AsyncExitStack() as stack:
            for uid in sorted({chip.uid for chip in load.chips}):  # always in this order, so that no two wait in a ring
                lock = self._locks.setdefault(uid, asyncio.Lock())
                if lock.locked():
                    on_phase(f"waiting for {uid}", 0.0)
                await stack.enter_async_context(lock)
            return await self._launcher.start(load, on_phase, environment)
