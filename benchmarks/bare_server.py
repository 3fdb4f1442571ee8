"""A server that answers completions with ready-made bytes: what is left of a request when nothing is done for it.

Prints its port. One event per token and one write per event, so the client works as hard as against a real server.
With --stamps the first token's text is when the request had been read and when that token was written, in monotonic
seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
TOKEN = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" a","finish_reason":null}]}\n\n'
HAS_STAMPS = "--stamps" in sys.argv[1:]
CHUNK = b"%x\r\n%s\r\n" % (len(TOKEN), TOKEN)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"content-length:" not in head.lower():
                break  # a look whether anybody is there
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            request = json.loads(await reader.readexactly(length))
            count = request["max_tokens"]
            read_s = time.monotonic()
            usage = b'{"prompt_tokens":30,"completion_tokens":%d}' % count
            if not request.get("stream"):
                body = (
                    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"bare","choices":[%s],"usage":%s}'
                )
                body %= (b'{"index":0,"text":" a","finish_reason":"length"}', usage)
                writer.write(WHOLE_HEAD % len(body) + body)
                continue
            writer.write(HEAD)
            for number in range(count):
                if HAS_STAMPS and number == 0:
                    token = b'data: {"choices":[{"index":0,"text":" %.6f %.6f"}]}\n\n' % (read_s, time.monotonic())
                    writer.write(b"%x\r\n%s\r\n" % (len(token), token))
                else:
                    writer.write(CHUNK)
                await asyncio.sleep(0)
            last = b'data: {"choices":[],"usage":%s}\n\ndata: [DONE]\n\n' % usage
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
