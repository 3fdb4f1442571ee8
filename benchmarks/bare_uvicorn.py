"""The same ready-made answers as `bare_server.py` from an ASGI application under uvicorn, which mxn's gateway runs on.

Prints its port. Streams are written one event at a time.
"""

from __future__ import annotations

import json
import socket
from typing import Any

import uvicorn

TOKEN = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" a","finish_reason":null}]}\n\n'
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream")]


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    request = json.loads(body)
    usage = b'{"prompt_tokens":30,"completion_tokens":%d}' % request["max_tokens"]
    await send({"type": "http.response.start", "status": 200, "headers": EVENTS if request["stream"] else JSON})
    if not request["stream"]:
        await send({"type": "http.response.body", "body": b'{"choices":[{"text":" a"}],"usage":%s}' % usage})
        return
    for _ in range(request["max_tokens"]):
        await send({"type": "http.response.body", "body": TOKEN, "more_body": True})
    last = b'data: {"choices":[],"usage":%s}\n\ndata: [DONE]\n\n' % usage
    await send({"type": "http.response.body", "body": last})


if __name__ == "__main__":
    # With another protocol number asyncio leaves Nagle's algorithm on, and each answer in two writes waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
