import asyncio

import pytest

from mxn.engine.http_stream import ConnectionPool, TransportError
from mxn.errors import ConfigError

from .canned import canned_server, chunk

BODY = b"hello, world" * 3


async def fetch(pool: ConnectionPool, *, timeout_s: float = 5) -> tuple[int, bytes]:
    got = bytearray()
    status = await pool.exchange(
        "POST", "/x", headers={"A": "b"}, body=b"{}", sink=lambda data, at: got.extend(data), timeout_s=timeout_s
    )
    return status, bytes(got)


def chunked(*parts: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(chunk(p) for p in parts) + b"0\r\nTrailer: x\r\n\r\n"


ANSWERS = {
    "length": b"HTTP/1.1 201 Created\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY),
    "chunked": chunked(BODY[:5], BODY[5:6], BODY[6:]),
    "continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_answer_is_read_however_it_is_cut(name: str) -> None:
    raw = ANSWERS[name]
    cuts = iter(range(1, len(raw)))

    def answer(request: bytes) -> list[bytes]:
        at = next(cuts, 1)
        return [raw[:at], raw[at:]]

    async with canned_server(answer) as url:
        pool = ConnectionPool(url)
        for _ in range(len(raw)):
            status, body = await fetch(pool)
            assert status in (200, 201)
            assert body == BODY
        pool.close()


async def test_connections_are_reused_and_path_prefix_kept() -> None:
    requests: list[bytes] = []

    def answer(request: bytes) -> list[bytes]:
        requests.append(request)
        return [ANSWERS["length"]]

    async with canned_server(answer) as url:
        pool = ConnectionPool(url)
        for _ in range(3):
            await fetch(pool)
        assert len(pool._idle) == 1
        pool.close()
    assert requests[0].startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_body_without_length_ends_with_the_connection() -> None:
    async with canned_server(lambda _: [b"HTTP/1.1 200 OK\r\n\r\n", BODY, b""]) as url:
        pool = ConnectionPool(url)
        assert await fetch(pool) == (200, BODY)
        assert not pool._idle
        assert await fetch(pool) == (200, BODY)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc", b""], "closed the connection"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "not HTTP"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"], "not HTTP"),
        ([b"x" * 70_000], "not HTTP"),
    ],
    ids=["broken-off", "ssh", "bad-chunk", "endless-header"],
)
async def test_broken_answer_is_an_error_and_not_a_hang(raw: list[bytes], reason: str) -> None:
    async with canned_server(lambda _: raw) as url:
        with pytest.raises(TransportError, match=reason):
            await fetch(ConnectionPool(url))


async def test_silent_server_times_out() -> None:
    async with canned_server(lambda _: [b"HTTP/1.1 200 OK\r\n"]) as url:
        with pytest.raises(TransportError, match=r"within 0\.1 s"):
            await fetch(ConnectionPool(url), timeout_s=0.1)


async def test_nobody_listening_says_where() -> None:
    with pytest.raises(TransportError, match=r"cannot connect to 127\.0\.0\.1:1"):
        await fetch(ConnectionPool("http://127.0.0.1:1/v1"))


def test_address_is_checked() -> None:
    for url in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(ConfigError, match="http://HOST:PORT"):
            ConnectionPool(url)


async def test_cancelled_exchange_closes_its_connection() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        closed.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    pool = ConnectionPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    task = asyncio.create_task(fetch(pool))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait_for(closed.wait(), 2)
    server.close()


async def test_a_kept_connection_that_the_server_drops_unseen_costs_a_new_one_not_a_fault() -> None:
    handlers: list[asyncio.Task[None] | None] = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")  # keep-alive is promised ...
        await reader.read(1)  # ... and broken when the next request comes
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = ConnectionPool(f"http://127.0.0.1:{port}")
    got: list[bytes] = []
    for _ in range(3):
        status = await pool.exchange(
            "GET", "/", headers={}, body=b"", sink=lambda data, at_s: got.append(data), timeout_s=5
        )
        assert status == 200
    assert b"".join(got) == b"okokok"
    assert len(handlers) == 3
    pool.close()
    await asyncio.gather(*(handler for handler in handlers if handler is not None), return_exceptions=True)
    server.close()
    await server.wait_closed()
