"""Starts on the same chip one after another: two models that load at once each see memory free that both will take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from mxn.engine.messages import Load
from mxn.fleet.launchers.base import Launcher
from mxn.fleet.replica import RunningReplica

_WORTH_TELLING_S = 0.05


class InTurn:
    """A `Launcher` around another. What a start waited for its chips stands in the replica's `load_s` as "turn"."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._locks: dict[str, asyncio.Lock] = {}

    async def start(
        self, load: Load, on_phase: Callable[[str, float], None], environment: Mapping[str, str]
    ) -> RunningReplica:
        began_s = time.monotonic()
        async with AsyncExitStack() as stack:
            for uid in sorted({chip.uid for chip in load.chips}):  # always in this order, so that no two wait in a ring
                lock = self._locks.setdefault(uid, asyncio.Lock())
                if lock.locked():
                    on_phase(f"waiting for {uid}", 0.0)
                await stack.enter_async_context(lock)
            waited_s = time.monotonic() - began_s
            replica = await self._launcher.start(load, on_phase, environment)
        if waited_s > _WORTH_TELLING_S and replica.info is not None:
            replica.info.load_s = {"turn": round(waited_s, 4), **replica.info.load_s}
        return replica
