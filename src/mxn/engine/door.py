"""Where gateways come to a replica that outlives them: a Unix socket, one gateway at a time, only of the same user."""

from __future__ import annotations

import logging
import os
import socket
import struct
import time

from mxn.engine.channel import ChannelError, ReplicaChannel
from mxn.engine.messages import Load, Stop, load_key

log = logging.getLogger("mxn.worker")

_GREETING_S = 5.0
"""Time a new gateway has to say what it wants."""


class Door:
    """A listening socket at which a gateway takes the replica over once the one before has gone."""

    def __init__(self, listener: socket.socket, adopt_s: float) -> None:
        """adopt_s: how long a replica without a gateway waits for one."""
        self._listener = listener
        self._adopt_s = adopt_s
        listener.listen(1)  # from here on the kernel tells those who connect that this process answers

    def open(self) -> ReplicaChannel | None:
        """The channel of the first gateway, or None when none came."""
        connection = self._accept(time.monotonic() + self._adopt_s)
        return None if connection is None else ReplicaChannel(connection)

    def next_gateway(self, load: Load) -> ReplicaChannel | None:
        """The channel of the next gateway that wants just what was loaded; None when none came, or one said to stop."""
        log.info("the gateway is gone; waiting %g s for another", self._adopt_s)
        deadline_s = time.monotonic() + self._adopt_s
        while (connection := self._accept(deadline_s)) is not None:
            channel = ReplicaChannel(connection)
            connection.settimeout(_GREETING_S)
            wanted = _greeting(channel)
            connection.settimeout(None)
            if isinstance(wanted, Stop):
                log.info("told to stop")
                return None
            if isinstance(wanted, Load) and load_key(wanted) == load_key(load):
                log.info("another gateway took over")
                return channel
            log.warning("a gateway that wants something else was turned away")
            channel.close()
        log.info("no gateway came: ending")
        return None

    def _accept(self, deadline_s: float) -> socket.socket | None:
        while (left_s := deadline_s - time.monotonic()) > 0:
            self._listener.settimeout(left_s)
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                break
            if _user_of(connection) == os.getuid():
                connection.settimeout(None)
                return connection
            log.error("a process of another user tried to connect and was refused")
            connection.close()
        return None


def peer_of(connection: socket.socket) -> tuple[int, int] | None:
    """(pid, user id) of the process at the other end, from the kernel; None where it does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def _user_of(connection: socket.socket) -> int:
    peer = peer_of(connection)
    return os.getuid() if peer is None else peer[1]  # without credentials, the folder's mode is what keeps others out


def _greeting(channel: ReplicaChannel) -> object:
    try:
        return channel.receive()
    except (ChannelError, OSError) as error:
        log.error("a gateway that connected said nothing readable: %s", error)
        return None
