"""A small HTTP/1.1 client: keep-alive, POST and GET, bodies handed on as they arrive.

For load generation and for servers that run behind a replica. General clients cost several times as much per streamed
event (see benchmarks/NOTES.md), which on a small machine takes cores away from the server. No redirects, cookies or
compression.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from mxn.errors import ConfigError, MxnError

MAX_HEADER_BYTES = 64 * 1024


class TransportError(MxnError):
    """The connection failed or the peer broke HTTP."""


class StaleConnectionError(TransportError):
    """A kept connection was closed by the peer before it saw the request; a new one may be tried."""


BodySink = Callable[[bytes, float], None]
"""Called with each piece of body and the time it arrived (monotonic seconds)."""


class Connection(asyncio.Protocol):
    """One keep-alive connection; one exchange at a time."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._done: asyncio.Future[int] | None = None
        self._sink: BodySink = lambda data, at_s: None
        self._status = 0
        self._remaining = -1  # bytes left of the body or chunk; -1: in the header or at a chunk's size line
        self._mode = "header"
        self._is_closing = False
        self._num_exchanges = 0

    @property
    def is_usable(self) -> bool:
        """True when another exchange can be made on it."""
        return self._transport is not None and not self._transport.is_closing() and not self._is_closing

    async def exchange(self, method: str, path: str, headers: dict[str, str], body: bytes, sink: BodySink) -> int:
        """Sends a request and feeds the answer's body to `sink`. Returns: the HTTP status.

        Raises: TransportError. A cancelled exchange closes the connection, which the server sees as a disconnect.
        """
        if self._transport is None or not self.is_usable:
            raise TransportError(f"the connection to {self._host} is closed")
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._done = asyncio.get_running_loop().create_future()
        self._sink, self._mode, self._remaining = sink, "header", -1
        self._num_exchanges += 1
        self._transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        try:
            return await self._done
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connection. Safe to call twice."""
        if self._transport is not None:
            self._transport.close()

    # ------------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._mode == "until-close":
            self._finish()
        elif self._mode == "header" and not self._buffer and self._num_exchanges > 1:
            self._fail("the peer closed a kept connection", StaleConnectionError)
        else:
            self._fail(f"the peer closed the connection in the middle of an answer{f': {exc}' if exc else ''}")

    def data_received(self, data: bytes) -> None:
        at_s = time.monotonic()
        self._buffer += data
        try:
            while self._advance(at_s):
                pass
        except (ValueError, IndexError, UnicodeDecodeError) as err:
            self._fail(f"the peer's answer is not HTTP/1.1: {err}")

    def _advance(self, at_s: float) -> bool:
        """Takes one thing from the buffer; False when more bytes are needed."""
        buffer = self._buffer
        if not buffer or self._done is None or self._done.done():
            return False
        if self._mode == "header":
            return self._take_header()
        if self._mode == "until-close":
            self._take_body(len(buffer), at_s)
            return False
        if self._mode == "length":
            self._remaining -= self._take_body(min(self._remaining, len(buffer)), at_s)
            if self._remaining == 0:
                self._finish()
            return False
        if self._remaining == -1:  # chunked: a size line
            end = buffer.find(b"\r\n")
            if end < 0:
                return False
            self._remaining = int(bytes(buffer[:end]).split(b";")[0], 16)
            del buffer[: end + 2]
            return True
        if self._remaining == 0:  # the last chunk: trailers up to an empty line
            end = buffer.find(b"\r\n")
            if end < 0:
                return False
            del buffer[: end + 2]
            if end == 0:
                self._finish()
                return False
            return True
        if len(buffer) < self._remaining + 2:  # chunks of an event stream are small: wait for the whole one
            return False
        self._take_body(self._remaining, at_s)
        del buffer[:2]
        self._remaining = -1
        return True

    def _take_header(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEADER_BYTES:
                raise ValueError(f"header longer than {MAX_HEADER_BYTES} bytes")
            return False
        status_line, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        self._status = int(status_line.split()[1])
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in (x.partition(":") for x in lines)}
        self._is_closing = headers.get("connection") == "close"
        if 100 <= self._status < 200:
            return True
        if "chunked" in headers.get("transfer-encoding", ""):
            self._mode = "chunked"
        elif "content-length" in headers:
            self._mode, self._remaining = "length", int(headers["content-length"])
            if self._remaining == 0:
                self._finish()
        else:
            self._mode = "until-close"
        return True

    def _take_body(self, count: int, at_s: float) -> int:
        self._sink(bytes(self._buffer[:count]), at_s)
        del self._buffer[:count]
        return count

    def _finish(self) -> None:
        self._mode = "idle"
        if self._done is not None and not self._done.done():
            self._done.set_result(self._status)

    def _fail(self, reason: str, kind: type[TransportError] = TransportError) -> None:
        self._is_closing = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(kind(f"{self._host}: {reason}"))


class ConnectionPool:
    """Keep-alive connections to one server; as many as exchanges run at once."""

    def __init__(self, base_url: str, *, connect_timeout_s: float = 10.0) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{base_url!r} is not a server address; expected http://HOST:PORT or https://HOST")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._hostname = parts.hostname
        self._port = parts.port or (443 if self._tls else 80)
        self._host = parts.netloc.rpartition("@")[2]
        self.path_prefix = parts.path.rstrip("/")
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[Connection] = []

    async def exchange(
        self, method: str, path: str, *, headers: dict[str, str], body: bytes, sink: BodySink, timeout_s: float | None
    ) -> int:
        """One request and its answer on a free connection. Raises: TransportError, also after `timeout_s` if it is set.

        A server may close a kept connection just as it is used again, without having seen the request: then another
        connection is taken, and the time that cost is part of the exchange.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    connection = await self._take()
                    try:
                        status = await connection.exchange(method, self.path_prefix + path, headers, body, sink)
                        break
                    except StaleConnectionError:
                        continue  # only a connection that served before can be stale, so this ends
        except TimeoutError as err:
            raise TransportError(f"{self._host}: no complete answer within {timeout_s} s") from err
        if connection.is_usable:
            self._idle.append(connection)
        return status

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._host), self._hostname, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as err:
            raise TransportError(
                f"cannot connect to {self._hostname}:{self._port}: {err or 'timed out'}; is the server running there?"
            ) from err
        return connection

    def close(self) -> None:
        """Closes the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
