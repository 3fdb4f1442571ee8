"""A small server that speaks OpenAI's completions or llama-server's protocol, and misbehaves as told. A script.

It answers token i of a prompt with (sum of the prompt + i) % 250, as text, as token ids, or both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import Any


class Upstream:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.num_running = 0
        self.num_disconnects = 0
        self.num_tokens = 0
        self.last: dict[str, Any] = {}
        self.salts: list[Any] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0]) if "content-length:" in head else 0
                body = await reader.readexactly(length)
                method, path, _ = head.split(" ", 2)
                if self.options.key and f"bearer {self.options.key}" not in head and path != "/health":
                    await self.answer(writer, {"error": {"message": "wrong key"}}, 401)
                elif method == "get":
                    await self.get(writer, path)
                else:
                    await self.complete(reader, writer, json.loads(body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def get(self, writer: asyncio.StreamWriter, path: str) -> None:
        if path == "/health":
            await self.answer(writer, {}, 503 if self.options.never_ready else 200)
        elif path == "/v1/models":
            await self.answer(writer, {"data": [{"id": self.options.model, "max_model_len": self.options.max_len}]})
        else:
            known = ("num_running", "num_disconnects", "num_tokens", "last", "salts")
            await self.answer(writer, {name: getattr(self, name) for name in known})

    async def answer(self, writer: asyncio.StreamWriter, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    async def complete(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.last = body
        self.salts.append(body.get("cache_salt"))
        prompt = body["prompt"] if isinstance(body["prompt"], list) else list(body["prompt"].encode())
        if len(prompt) > 1000:
            await self.answer(writer, {"error": {"message": "the prompt is too long for me"}}, 400)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.num_running += 1
        try:
            await self.stream(writer, body, prompt)
        except (ConnectionError, RuntimeError):
            self.num_disconnects += 1
            raise ConnectionError from None
        finally:
            self.num_running -= 1

    async def stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], prompt: list[int]) -> None:
        options = self.options
        limit = body.get("max_tokens", body.get("n_predict"))
        stops = set(body.get("stop_token_ids", []))
        if not body.get("ignore_eos"):
            stops.add(options.eos)
        reason = "length"
        for i in range(limit):
            token = options.eos if i == options.eos_at else (sum(prompt) + i) % 250
            self.num_tokens += 1
            if options.die_after and self.num_tokens > options.die_after:
                print("RuntimeError: the upstream chip is gone", file=sys.stderr, flush=True)
                os._exit(3)
            if options.error_after and i >= options.error_after:
                await self.event(writer, {"error": {"message": "out of luck"}})
                break
            await self.event(writer, self.token_event(body, token, i))
            await asyncio.sleep(options.token_ms / 1000)
            while options.hang_after and self.num_tokens >= options.hang_after:
                await asyncio.sleep(1)
            if writer.is_closing():
                raise ConnectionError
            if token in stops:
                reason = "stop"
                break
        else:
            i = limit - 1
        await self.end(writer, len(prompt), i + 1, reason)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def token_event(self, body: dict[str, Any], token: int, i: int) -> dict[str, Any]:
        text = "" if token == self.options.eos else chr(97 + token % 26)
        if self.options.protocol == "llama.cpp":
            event: dict[str, Any] = {"content": text, "tokens": [token], "stop": False, "tokens_predicted": i + 1}
            if body.get("n_probs"):
                top = [{"id": token, "logprob": -0.5}]
                event["completion_probabilities"] = [{"id": token, "logprob": -0.5, "top_logprobs": top}]
            return event
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = [token]
        if body.get("logprobs") is not None:
            name = f"token_id:{token}"
            choice["logprobs"] = {"tokens": [name], "token_logprobs": [-0.5], "top_logprobs": [{name: -0.5}]}
        return {"choices": [choice]}

    async def end(self, writer: asyncio.StreamWriter, num_prompt: int, num_tokens: int, reason: str) -> None:
        if self.options.protocol == "llama.cpp":
            kind = {"stop": "eos", "length": "limit"}[reason]
            counts = {"tokens_predicted": num_tokens, "tokens_evaluated": num_prompt, "timings": {"cache_n": 3}}
            await self.event(writer, {"content": "", "tokens": [], "stop": True, "stop_type": kind, **counts})
            return
        await self.event(writer, {"choices": [{"index": 0, "text": "", "finish_reason": reason}]})
        if not self.options.no_usage:
            details = {"cached_tokens": 3}
            usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "prompt_tokens_details": details}
            await self.event(writer, {"choices": [], "usage": usage})
        await self.chunk(writer, b"data: [DONE]\n\n")

    async def event(self, writer: asyncio.StreamWriter, value: object) -> None:
        await self.chunk(writer, b"data: " + json.dumps(value).encode() + b"\n\n")

    async def chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="fake-model")
    parser.add_argument("--max-len", type=int)
    parser.add_argument("--protocol", default="completions")
    parser.add_argument("--key", default="")
    parser.add_argument("--eos", type=int, default=256)
    parser.add_argument("--eos-at", type=int, default=-1)
    parser.add_argument("--token-ms", type=float, default=0)
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--hang-after", type=int, default=0)
    parser.add_argument("--error-after", type=int, default=0)
    parser.add_argument("--no-usage", action="store_true")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--fail", default="", help="print this and exit before listening")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--grandchild", default="", help="file to write the id of a process of another session to")
    options = parser.parse_args()
    print(f"starting with process id {os.getpid()}", flush=True)
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.grandchild:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        with open(options.grandchild, "w") as file:
            file.write(f"{os.getpid()} {sleeper.pid}")
    if options.fail:
        print(options.fail, file=sys.stderr)
        print("RuntimeError: start-up failed, see root cause above", file=sys.stderr)
        sys.exit(1)
    server = await asyncio.start_server(Upstream(options).serve, "127.0.0.1", options.port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
