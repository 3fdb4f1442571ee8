"""One client of an OpenAI-compatible server: streamed completions and chats, each token's arrival timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from mxn.engine.http_stream import ConnectionPool, TransportError

Message = dict[str, str]
"""One message of a chat: its role and its content."""

Prompt = str | list[Message]
"""What is asked: a text to continue, or a chat to answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestResult:
    """What one request did. Times are monotonic seconds.

    chunk_times_s: arrival of each piece of the stream that carried output; the first one is the TTFT's end.
    num_output_tokens, num_prompt_tokens: as the server counted them; prompt None when it did not say.
    error, error_kind: why the request failed, for people and for counting; None when it ended as asked.
    scheduled_s: when an open loop meant to send it; None in a closed loop.
    asked_output_tokens, asked_prompt_tokens: what it should have been; None where that is not known.
    text: what was said, kept only where the next turn of a conversation needs it.
    """

    start_s: float
    end_s: float
    chunk_times_s: tuple[float, ...]
    num_output_tokens: int
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    error: str | None = None
    error_kind: str | None = None
    scheduled_s: float | None = None
    asked_output_tokens: int | None = None
    asked_prompt_tokens: int | None = None
    text: str = ""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Said(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    delta: _Said | None = None

    @property
    def said(self) -> str:
        """The text of a piece, whichever of the two APIs it comes from."""
        return self.text if self.delta is None else (self.delta.content or self.delta.reasoning_content or "")


class _Chunk(msgspec.Struct):
    """The parts of a completion or one of its stream chunks that are measured."""

    choices: list[msgspec.Raw] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode
_decode_choice = msgspec.json.Decoder(_Choice).decode
_encode = msgspec.json.encode


@dataclass(slots=True)
class _Stream:
    """Collects one event stream as its bytes arrive.

    is_chat: pieces without text carry no output, such as the one that only names the role.
    """

    is_chat: bool = False

    times_s: list[float] = field(default_factory=list)
    usage: _Usage | None = None
    error: str | None = None
    error_kind: str | None = None
    is_done: bool = False
    raw: bytearray = field(default_factory=bytearray)
    texts: list[str] | None = None

    def feed(self, data: bytes, at_s: float) -> None:
        if self.raw or not data.endswith(b"\n\n"):
            self.raw += data
            end = self.raw.rfind(b"\n")
            if end < 0:
                return
            data = bytes(self.raw[: end + 1])
            del self.raw[: end + 1]
        for line in data.split(b"\n"):
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), at_s)

    def _event(self, event: bytes, at_s: float) -> None:
        if event == b"[DONE]":
            self.is_done = True
            return
        try:
            chunk = _decode(event)
        except msgspec.DecodeError as err:
            self.error = self.error or f"an event is not a completion chunk: {err}"
            self.error_kind = self.error_kind or "bad_stream"
            return
        if chunk.error is not None:
            self.error = chunk.error.message or "the server sent an error without a message"
            self.error_kind = "error_event"
        if chunk.usage is not None:
            self.usage = chunk.usage
        if not chunk.choices:
            return
        if self.is_chat or self.texts is not None:
            text = _decode_choice(chunk.choices[0]).said
            if self.is_chat and not text:
                return
            if self.texts is not None:
                self.texts.append(text)
        self.times_s.append(at_s)


class CompletionsClient:
    """Sends texts to `{base_url}/completions` and chats to `{base_url}/chat/completions`; `base_url` ends in /v1.

    extra: fields added to every request; `ignore_eos` is understood by mxn, vLLM, SGLang and llama-server.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key: str | None = None,
        extra: dict[str, object] | None = None,
        timeout_s: float = 900.0,
    ) -> None:
        self._pool = ConnectionPool(base_url.rstrip("/"))
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._fields = {"model": model, "temperature": 0, **({"ignore_eos": True} if extra is None else extra)}
        self._timeout_s = timeout_s

    async def complete(
        self, prompt: Prompt, max_tokens: int, *, stream: bool = True, keeps_text: bool = False
    ) -> RequestResult:
        """One request. Never raises for a server that refuses, breaks off or cannot be reached: the result says so."""
        is_chat = not isinstance(prompt, str)
        path, what = ("/chat/completions", "messages") if is_chat else ("/completions", "prompt")
        fields = {**self._fields, what: prompt, "max_tokens": max_tokens, "stream": stream}
        if stream:
            fields["stream_options"] = {"include_usage": True}
        body, parts = _encode(fields), bytearray()
        answer = _Stream(is_chat=is_chat, texts=[] if keeps_text else None)
        sink: Callable[[bytes, float], None] = answer.feed if stream else lambda data, at_s: parts.extend(data)
        start_s = time.monotonic()
        try:
            status = await self._pool.exchange(
                "POST", path, headers=self._headers, body=body, sink=sink, timeout_s=self._timeout_s
            )
            end_s = time.monotonic()
            if status != 200:
                answer.error = f"HTTP {status}: {_error_text(bytes(answer.raw) if stream else bytes(parts))}"
                answer.error_kind = f"http_{status}"
            elif not stream:
                answer.usage, answer.times_s, answer.is_done = _decode(bytes(parts)).usage, [end_s], True
        except (TransportError, msgspec.DecodeError) as err:
            end_s, answer.error = time.monotonic(), str(err)
            answer.error_kind = "connection" if isinstance(err, TransportError) else "bad_answer"
        if answer.error is None and not answer.is_done:
            answer.error, answer.error_kind = "the stream ended without [DONE]", "bad_stream"
        usage = answer.usage or _Usage(completion_tokens=len(answer.times_s))
        details = usage.prompt_tokens_details
        return RequestResult(
            start_s=start_s,
            end_s=end_s,
            chunk_times_s=tuple(answer.times_s),
            num_output_tokens=usage.completion_tokens,
            num_prompt_tokens=usage.prompt_tokens,
            num_cached_tokens=details.cached_tokens if details else None,
            error=answer.error,
            error_kind=answer.error_kind,
            asked_output_tokens=max_tokens,
            text="".join(answer.texts or ()),
        )

    async def run(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        """All prompts in a closed loop, `concurrency` at a time; results in the order of the prompts."""
        results: list[RequestResult | None] = [None] * len(prompts)
        waiting = iter(enumerate(prompts))

        async def worker() -> None:
            for index, prompt in waiting:
                results[index] = await self.complete(prompt, max_tokens)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(prompts))):
                group.create_task(worker())
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Closes the connections."""
        self._pool.close()


def _error_text(body: bytes) -> str:
    try:
        error = _decode(body).error
    except msgspec.DecodeError:
        error = None
    return error.message if error and error.message else body[:300].decode(errors="replace")
