"""Says that a replica's process lives, so that the gateway can tell a long step from a process that hangs."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from mxn.engine.channel import ReplicaChannel
from mxn.engine.messages import ALIVE_S, Alive


class Heartbeat:
    """While entered, a thread sends `Alive` whenever nothing else has been sent for a while."""

    def __init__(self, channel: ReplicaChannel) -> None:
        self._channel = channel
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(ALIVE_S / 2):
            if self._channel.quiet_s < ALIVE_S / 2:
                continue
            try:
                self._channel.send(Alive())
            except OSError:
                return  # the gateway is gone, which the reader notices
