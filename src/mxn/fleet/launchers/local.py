"""Starts a replica as a child process of this one, joined by a socket pair: nothing listens anywhere."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Mapping

from mxn.config.environment import child_environment
from mxn.engine.messages import Load
from mxn.fleet.replica import Replica, ReplicaLink

ENVIRONMENT = {
    # libgomp's caller otherwise spins for threads the system is not running; on two cores with a busy neighbour that
    # made steps of torch's own operators 10 to 20 times slower. It is read when torch is imported.
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables that a process with an engine in it gets unless this process's own environment says otherwise."""


class LocalLauncher:
    """A `Launcher` whose replicas are processes of this machine."""

    async def start(
        self, load: Load, on_phase: Callable[[str, float], None], environment: Mapping[str, str]
    ) -> Replica:
        return await Replica.start(await launch(environment), load, on_phase)


async def launch(environment: Mapping[str, str] | None = None) -> ReplicaLink:
    """Starts `python -m mxn.engine.worker` with the current interpreter.

    environment: variables to set in the child beside this process's own, which stand above mxn's defaults.
    """
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mxn.engine.worker",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(dict(environment or {}), defaults=ENVIRONMENT),
            start_new_session=True,  # Ctrl-C reaches the gateway only, which then drains its replicas
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    return ReplicaLink(process, reader, writer)
