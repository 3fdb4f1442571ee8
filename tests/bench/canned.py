"""A server that answers every request with given bytes, for tests of the load generator."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

Answer = Callable[[bytes], list[bytes]]
"""From the raw request to the pieces to send; an empty piece closes the connection."""


@asynccontextmanager
async def canned_server(answer: Answer) -> AsyncIterator[str]:
    """Serves on a free loopback port. Yields the base URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                for piece in answer(head + body):
                    if not piece:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.close()


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def sse(num_tokens: int, *, prompt_tokens: int = 5, cached: int | None = None) -> list[bytes]:
    """The events of a streamed completion, as separate pieces of body."""
    details = b"" if cached is None else b',"prompt_tokens_details":{"cached_tokens":%d}' % cached
    usage = b'{"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d%s}}' % (
        prompt_tokens,
        num_tokens,
        details,
    )
    tokens = [b'{"choices":[{"index":0,"text":"a","finish_reason":null}]}'] * num_tokens
    return [b"data: " + event + b"\n\n" for event in (*tokens, usage, b"[DONE]")]


def stream(num_tokens: int, *, prompt_tokens: int = 5, cached: int | None = None) -> list[bytes]:
    """A whole streamed answer, one chunk per event."""
    events = sse(num_tokens, prompt_tokens=prompt_tokens, cached=cached)
    return [STREAM_HEAD, *(chunk(event) for event in events), b"0\r\n\r\n"]
