"""What a way to start replicas must offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from mxn.engine.messages import Load
from mxn.fleet.replica import RunningReplica


class Launcher(Protocol):
    """Starts replicas. A keeper calls it for each start and restart of its placement; one launcher may serve many."""

    async def start(
        self, load: Load, on_phase: Callable[[str, float], None], environment: Mapping[str, str]
    ) -> RunningReplica:
        """Starts a replica, lets it load, and returns when it can serve.

        on_phase: called with a phase's name and the share of it that is done, as loading goes on.
        environment: variables to set for the replica beside those of this process.
        Cancelling the call ends what was begun. Raises: MxnError with the cause; nothing is left running then.
        """
        ...
