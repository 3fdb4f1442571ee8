"""Message frames over a stream socket: a 4-byte little-endian length, then msgpack. Used on both sides of a replica."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from mxn.engine.messages import MAX_FRAME_BYTES, ToGateway, ToReplica
from mxn.errors import MxnError

_encode = msgspec.msgpack.Encoder().encode
_to_gateway: msgspec.msgpack.Decoder[ToGateway] = msgspec.msgpack.Decoder(ToGateway)
_to_replica: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica)


class ChannelError(MxnError):
    """The other side sent something that is no message; the connection cannot be used any more."""


def pack(message: ToGateway | ToReplica) -> bytes:
    """One message as a frame."""
    body = _encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ChannelError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(4, "little") + body


class ReplicaChannel:
    """The replica's end: blocking, one reader thread and one writer thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb")

    def send(self, message: ToGateway) -> None:
        """Sends one message. Raises: OSError when the gateway is gone."""
        self._connection.sendall(pack(message))

    def receive(self) -> ToReplica | None:
        """The next message, or None when the gateway closed the connection."""
        head = self._reader.read(4)
        if len(head) < 4:
            return None
        size = _checked_size(head)
        body = self._reader.read(size)
        if len(body) < size:
            return None
        try:
            return _to_replica.decode(body)
        except msgspec.MsgspecError as error:
            raise ChannelError(f"unreadable message from the gateway: {error}") from error

    def close(self) -> None:
        """Closes the connection; the gateway sees its end."""
        self._reader.close()
        self._connection.close()


async def receive_from_replica(reader: asyncio.StreamReader) -> ToGateway | None:
    """The gateway's end: the next message of a replica, or None when the replica closed the connection."""
    try:
        body = await reader.readexactly(_checked_size(await reader.readexactly(4)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    try:
        return _to_gateway.decode(body)
    except msgspec.MsgspecError as error:
        raise ChannelError(f"unreadable message from the replica: {error}") from error


def _checked_size(head: bytes) -> int:
    size = int.from_bytes(head, "little")
    if size > MAX_FRAME_BYTES:
        raise ChannelError(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
    return size
