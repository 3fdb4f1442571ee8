"""OpenVINO GenAI's pipeline behind OpenAI's streamed completions. A script for the environment OpenVINO is in.

Prompts are token ids and answers carry token ids ("return_token_ids"), so the client's tokenizer is the only one.
The first start exports the model with optimum; others take what is there.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXPORT = {"int8": ["int8"], "fp16": ["fp16"], "int4": ["int4", "--group-size", "64", "--ratio", "1.0"]}
MAX_BODY_BYTES = 64 << 20
CHECK_S = 0.2
"""While no token comes, how often to look whether the client is still there."""


class RefusedError(Exception):
    """A request that cannot be served, with the reason."""


def export(model: Path, out: Path, weights: str) -> None:
    """Exports a Hugging Face folder into `out`, beside it and renamed, so that a half-made one is never used."""
    if (out / "openvino_model.xml").is_file():
        return
    beside = out.with_name(f"{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"exporting {model} to {weights} for OpenVINO; this is done once", flush=True)
    program = Path(sys.executable).with_name("optimum-cli")
    command = [str(program), "export", "openvino", "--model", str(model), "--task", "text-generation-with-past"]
    try:
        subprocess.run([*command, "--weight-format", *EXPORT[weights], str(beside)], check=True)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class Sequence:
    """One request at the pipeline. `deliver` is called on the engine's thread with (token ids, finish reason or "")."""

    def __init__(self, token_ids: list[int], config: Any, deliver: Callable[[list[int], str], None]) -> None:
        self.token_ids = token_ids
        self.config = config
        self.deliver = deliver
        self.handle: Any = None
        self.is_cancelled = False


class Engine(threading.Thread):
    """Owns the pipeline: adds, steps, reads and cancels, all on one thread."""

    def __init__(
        self, pipeline: Any, to_tensor: Callable[[list[int]], Any], on_death: Callable[[Exception], None]
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.num_running = 0
        self._pipeline = pipeline
        self._to_tensor = to_tensor
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Sequence] = queue.SimpleQueue()
        self._running: dict[int, Sequence] = {}
        self._next_id = 0

    def submit(self, sequence: Sequence) -> None:
        """Begins a sequence, or, when it is cancelled, ends it."""
        self._inbox.put(sequence)

    def run(self) -> None:
        try:
            while True:
                self._take(wait=not self._running)
                if self._running:
                    self._pipeline.step()
                    for number, sequence in list(self._running.items()):
                        self._read(number, sequence)
                self.num_running = len(self._running)
        except Exception as error:
            self._on_death(error)

    def _take(self, *, wait: bool) -> None:
        while True:
            try:
                sequence = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if sequence.handle is not None:
                sequence.handle.cancel()
            elif not sequence.is_cancelled:
                self._next_id += 1
                tensor = self._to_tensor(sequence.token_ids)
                sequence.handle = self._pipeline.add_request(self._next_id, tensor, sequence.config)
                self._running[self._next_id] = sequence

    def _read(self, number: int, sequence: Sequence) -> None:
        token_ids: list[int] = []
        reason = ""
        while sequence.handle.can_read():
            for output in sequence.handle.read().values():
                token_ids += output.generated_ids
                reason = output.finish_reason.name.lower().replace("none", "") or reason
        status = sequence.handle.get_status().name
        if status != "RUNNING":
            del self._running[number]
            reason = reason or {"IGNORED": "ignored", "CANCEL": "cancelled"}.get(status, "stop")
        if token_ids or reason:
            sequence.deliver(token_ids, reason)


class Server:
    """The HTTP side: GET /health and /v1/models, POST /v1/completions as an event stream."""

    def __init__(
        self, engine: Engine, make_config: Callable[[dict[str, Any]], Any], options: argparse.Namespace
    ) -> None:
        self._engine = engine
        self._make_config = make_config
        self._options = options
        self._key = os.environ.get("MXN_OPENVINO_KEY", "")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handles the requests of one connection."""
        try:
            while True:
                method, path, headers = await _read_head(reader)
                length = int(headers.get("content-length", "0"))
                if length > MAX_BODY_BYTES:
                    await _answer(writer, 413, f"a body of {length} bytes is over the limit of {MAX_BODY_BYTES}")
                    return
                body = await reader.readexactly(length)
                given = headers.get("authorization", "").removeprefix("Bearer ")
                if path == "/health":
                    await _answer(writer, 200, {"status": "ok", "num_running": self._engine.num_running})
                elif not hmac.compare_digest(given, self._key):
                    await _answer(writer, 401, "the key is wrong")
                elif (method, path) == ("GET", "/v1/models"):
                    await _answer(
                        writer, 200, {"object": "list", "data": [{"id": self._options.name, "object": "model"}]}
                    )
                elif (method, path) == ("POST", "/v1/completions"):
                    await self._complete(reader, writer, body)
                else:
                    await _answer(writer, 404, f"there is no {method} {path}")
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            pass  # the client is gone, or does not speak HTTP
        finally:
            writer.close()

    async def _complete(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[list[int], str]] = asyncio.Queue()

        def deliver(token_ids: list[int], reason: str) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (token_ids, reason))

        try:
            prompt, config = self._check(body)
        except RefusedError as error:
            await _answer(writer, 400, str(error))
            return
        sequence = Sequence(prompt, config, deliver)
        self._engine.submit(sequence)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        num_output, reason = 0, ""
        try:
            while not reason:
                if reader.at_eof():
                    raise ConnectionError("the client is gone")
                try:
                    async with asyncio.timeout(CHECK_S):
                        token_ids, reason = await arrived.get()
                except TimeoutError:
                    continue
                num_output += len(token_ids)
                if reason not in ("", "stop", "length"):
                    await _event(writer, {"error": {"message": _REASONS.get(reason, f"the pipeline says {reason}")}})
                    break
                choice = {"index": 0, "text": "", "token_ids": token_ids, "finish_reason": reason or None}
                await _event(writer, {"object": "text_completion", "choices": [choice]})
            usage = {"prompt_tokens": len(prompt), "completion_tokens": num_output}
            await _event(writer, {"object": "text_completion", "choices": [], "usage": usage})
            await _chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        except ConnectionError:
            sequence.is_cancelled = True
            self._engine.submit(sequence)
            raise

    def _check(self, body: bytes) -> tuple[list[int], Any]:
        """The prompt and the pipeline's settings. Raises: RefusedError naming the field at fault."""
        try:
            fields = json.loads(body)
            prompt = fields["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError("expected a JSON object with prompt") from error
        if not (isinstance(prompt, list) and prompt and all(type(token_id) is int for token_id in prompt)):
            raise RefusedError("prompt must be a list of token ids")
        if min(prompt) < 0 or max(prompt) >= self._options.vocab_size:
            raise RefusedError(f"prompt must hold token ids below {self._options.vocab_size}")
        if not fields.get("stream"):
            raise RefusedError("stream must be true")
        try:
            return prompt, self._make_config(fields)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RefusedError(str(error)) from error


_REASONS = {
    "ignored": "the pipeline has no room for this sequence in its cache",
    "cancelled": "the sequence was cancelled",
}


def generation_config(genai: Any, fields: dict[str, Any]) -> Any:
    """The request's sampling as OpenVINO GenAI has it."""
    config = genai.GenerationConfig()
    config.max_new_tokens = int(fields.get("max_tokens", 16))
    config.min_new_tokens = int(fields.get("min_tokens", 0))
    config.ignore_eos = bool(fields.get("ignore_eos", False))
    config.stop_token_ids = set(fields.get("stop_token_ids", ()))
    config.repetition_penalty = float(fields.get("repetition_penalty", 1.0))
    config.presence_penalty = float(fields.get("presence_penalty", 0.0))
    config.frequency_penalty = float(fields.get("frequency_penalty", 0.0))
    temperature = float(fields.get("temperature", 1.0))
    if temperature > 0:
        config.do_sample = True
        config.temperature = temperature
        config.top_p = float(fields.get("top_p", 1.0))
        config.min_p = float(fields.get("min_p", 0.0))
        if int(fields.get("top_k", 0)) > 0:
            config.top_k = int(fields["top_k"])
        seed = fields.get("seed")
        config.rng_seed = (int.from_bytes(os.urandom(4)) if seed is None else int(seed)) % 2**32
    else:
        config.do_sample = False
    config.validate()
    return config


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]]:
    """Method, path and headers, their names in lower case. Raises: ValueError for what is no HTTP."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.LimitOverrunError as error:
        raise ValueError("the header is too long") from error
    method, path, _ = head[0].split(" ", 2)
    pairs = (line.partition(":") for line in head[1:] if line)
    return method, path, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _answer(writer: asyncio.StreamWriter, status: int, value: object) -> None:
    body = json.dumps(value if status == 200 else {"error": {"message": value}}).encode()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def _event(writer: asyncio.StreamWriter, value: object) -> None:
    await _chunk(writer, b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    await writer.drain()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder to export from")
    parser.add_argument(
        "--ir", type=Path, required=True, help="folder with the exported model, made when it is not there"
    )
    parser.add_argument("--weights", choices=sorted(EXPORT), default="int8")
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kv-gib", type=int, default=1)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-step-tokens", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--prefix-cache", action="store_true")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace) -> tuple[Any, Callable[[list[int]], Any], Callable[[dict[str, Any]], Any]]:
    """The pipeline, what makes its tensors, and what makes its settings."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = options.kv_gib
    scheduler.max_num_seqs = options.max_num_seqs
    scheduler.max_num_batched_tokens = options.max_step_tokens
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = options.prefix_cache
    properties = {"INFERENCE_NUM_THREADS": options.threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(options.ir), scheduler, "CPU", properties)

    def to_tensor(token_ids: list[int]) -> Any:
        return openvino.Tensor(np.array([token_ids], dtype=np.int64))

    return pipeline, to_tensor, lambda fields: generation_config(openvino_genai, fields)


async def main() -> None:
    """Exports if need be, loads, and serves until it is ended."""
    options = parse()
    export(options.model, options.ir, options.weights)
    pipeline, to_tensor, make_config = load(options)
    loop = asyncio.get_running_loop()
    dead: asyncio.Future[None] = loop.create_future()
    engine = Engine(pipeline, to_tensor, lambda error: loop.call_soon_threadsafe(dead.set_exception, error))
    engine.start()
    server = await asyncio.start_server(Server(engine, make_config, options).serve, "127.0.0.1", options.port)
    async with server:
        await dead


if __name__ == "__main__":
    asyncio.run(main())
