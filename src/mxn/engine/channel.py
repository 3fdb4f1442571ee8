"""Message frames over a stream socket: a 4-byte little-endian length, then msgpack. Used on both sides of a replica."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import msgspec

from mxn.engine.messages import MAX_FRAME_BYTES, ToGateway, ToReplica
from mxn.errors import MxnError

_HEAD_BYTES = 4
_READ_BYTES = 1 << 18
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


def messages_of(frames: bytes) -> list[ToReplica]:
    """The messages of whole frames, where something other than a socket carries them."""
    buffer, messages = bytearray(frames), []
    while (message := _take(buffer)) is not None:
        messages.append(message)
    if buffer:
        raise ChannelError(f"{len(buffer)} bytes after the last whole frame")
    return messages


class ReplicaChannel:
    """The replica's end. One thread reads, by `receive` or by `receive_ready`; any may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._sending = threading.Lock()
        self._sent_s = time.monotonic()

    @property
    def quiet_s(self) -> float:
        """Seconds since the last message was sent."""
        return time.monotonic() - self._sent_s

    def fileno(self) -> int:
        """What a loop watches to know when `receive_ready` has something."""
        return self._connection.fileno()

    def send(self, message: ToGateway) -> None:
        """Sends one message. Raises: OSError when the gateway is gone."""
        frame = pack(message)
        with self._sending:
            self._connection.sendall(frame)
            self._sent_s = time.monotonic()

    def receive(self) -> ToReplica | None:
        """The next message, or None when the gateway closed the connection."""
        while (message := _take(self._buffer)) is None:
            data = self._connection.recv(_READ_BYTES)
            if not data:
                return None
            self._buffer += data
        return message

    def receive_ready(self) -> list[ToReplica | None]:
        """The messages that are there already; the last is None when the gateway closed the connection."""
        is_closed = False
        while not is_closed:
            try:
                data = self._connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            self._buffer += data
            is_closed = not data
        messages: list[ToReplica | None] = []
        while (message := _take(self._buffer)) is not None:
            messages.append(message)
        return [*messages, None] if is_closed else messages

    def close(self) -> None:
        """Closes the connection; the gateway sees its end."""
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


def _take(buffer: bytearray) -> ToReplica | None:
    """Takes the first message out of a buffer; None while it is not whole."""
    if len(buffer) < _HEAD_BYTES:
        return None
    end = _HEAD_BYTES + _checked_size(bytes(buffer[:_HEAD_BYTES]))
    if len(buffer) < end:
        return None
    body = bytes(buffer[_HEAD_BYTES:end])
    del buffer[:end]
    try:
        return _to_replica.decode(body)
    except msgspec.MsgspecError as error:
        raise ChannelError(f"unreadable message from the gateway: {error}") from error


def _checked_size(head: bytes) -> int:
    size = int.from_bytes(head, "little")
    if size > MAX_FRAME_BYTES:
        raise ChannelError(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
    return size
