"""The two text APIs' answers on the wire: whole, or as server-sent events built from parts encoded once per request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from mxn.server.errors import ErrorAnswer

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, over all its completions.

    mxn: what the client asked for beyond OpenAI's fields: {"energy_j", "source"}.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    mxn: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        usage = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
        return usage if self.mxn is None else {**usage, "mxn": self.mxn}


def error_event(answer: ErrorAnswer) -> bytes:
    """An error as the last event of a stream; no [DONE] follows it."""
    return b"data: " + answer.body() + b"\n\n"


class Answer(ABC):
    """Identity of one answer and the parts of its events that never change."""

    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, *, answer_id: str, created_s: int, model: str, fingerprint: str, has_usage: bool) -> None:
        self._head = {"id": answer_id, "created": created_s, "model": model, "system_fingerprint": fingerprint}
        chunk_head = _encode({"object": self.chunk_kind, **self._head})
        self._start = b"data: " + chunk_head[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> bytes:
        """The answer as one JSON object."""
        return _encode({"object": self.whole_kind, **self._head, "choices": choices, "usage": usage.as_json()})

    def usage_event(self, usage: Usage) -> bytes:
        """The event that carries the usage and no choices."""
        return self._start + b'],"usage":' + _encode(usage.as_json()) + b"}\n\n"

    def first_event(self, index: int) -> bytes:
        """What a choice begins with."""
        return b""

    @abstractmethod
    def event(self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> bytes:
        """A piece of one choice."""

    @staticmethod
    @abstractmethod
    def choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        """One choice of a whole answer."""


class ChatAnswer(Answer):
    """Answers of /v1/chat/completions."""

    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def first_event(self, index: int) -> bytes:
        delta = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
        return self._start + delta + self._end

    def event(self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> bytes:
        delta = b'{"content":' + _encode(text) + b"}" if text or finish_reason is None else b"{}"
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._start,
            index,
            delta,
            _encode(logprobs),
            _encode(finish_reason),
            self._end,
        )

    @staticmethod
    def choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionAnswer(Answer):
    """Answers of /v1/completions."""

    whole_kind = "text_completion"
    chunk_kind = "text_completion"

    def event(self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> bytes:
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._start,
            index,
            _encode(text),
            _encode(logprobs),
            _encode(finish_reason),
            self._end,
        )

    @staticmethod
    def choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
