"""Guards on each TCP connection that uvicorn does not have: how long a request's head may take, and a client's reading.

uvicorn bounds neither the time to send headers (a slow loris) nor the time a client takes to read; here both end the
connection, which the application sees as a disconnect and answers with an abort.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from mxn.server.errors import ErrorAnswer
from mxn.server.settings import ServerSettings


class _Guarded:
    """Mixed into one of uvicorn's HTTP protocols."""

    settings: ServerSettings
    connections: set[Any]
    cycle: Any
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        if len(self.connections) > self.settings.max_connections:
            limit = self.settings.max_connections
            self._refuse(503, f"the server has {limit} connections open, its limit (server setting max_connections)")
            return
        self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_head_timer()
        self._disarm_send_timer()
        super().connection_lost(exc)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm_head_timer()
        elif not self.transport.is_closing():
            self._arm_head_timer()  # part of a head, or what is left of a body that was refused

    def on_response_complete(self) -> None:
        self._disarm_head_timer()
        super().on_response_complete()  # type: ignore[misc]

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self.settings.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._disarm_send_timer()
        super().resume_writing()  # type: ignore[misc]

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP request in OpenAI's shape."""
        self._refuse(400, "this is not a valid HTTP request, or its head is too large")

    def _arm_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.settings.head_timeout_s, self._head_took_too_long)

    def _disarm_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _disarm_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _head_took_too_long(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = ErrorAnswer(status=status, message=message).body()
        phrase = {400: b"Bad Request", 503: b"Service Unavailable"}[status]
        head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, phrase, len(body)) + body)
        self.transport.close()


def protocol_for(settings: ServerSettings) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn with these limits: httptools' parser where it is installed, else h11's."""
    base: type[Any] = H11Protocol
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return type("GuardedH11Protocol", (_Guarded, base), {"settings": settings})
    return type("GuardedHttpToolsProtocol", (_HeadCounted, _Guarded, HttpToolsProtocol), {"settings": settings})


class _HeadCounted:
    """Bounds a request's head for httptools, which has no limit of its own."""

    settings: ServerSettings
    _head_bytes = 0

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()  # type: ignore[misc]

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)  # type: ignore[misc]

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)  # type: ignore[misc]

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.settings.max_head_bytes:
            raise ValueError("the request's head is too large")  # the parser reports it as an invalid request
