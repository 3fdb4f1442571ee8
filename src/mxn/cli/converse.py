"""One streamed turn of a conversation with an OpenAI-compatible server, with its timing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mxn.errors import BackendError, MxnError, UnavailableError

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]


@dataclass(slots=True)
class Turn:
    """What a turn took, once its text has been iterated to the end. `finish_reason` length: cut off by the limit."""

    start_s: float = 0.0
    first_s: float | None = None
    end_s: float = 0.0
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    finish_reason: str | None = None

    def stats_text(self) -> str:
        """TTFT, speed and counts on one line."""
        parts = []
        if self.first_s is not None:
            parts.append(f"TTFT {1e3 * (self.first_s - self.start_s):.0f} ms")
            if self.num_output_tokens and self.num_output_tokens > 1 and self.end_s > self.first_s:
                parts.append(f"{(self.num_output_tokens - 1) / (self.end_s - self.first_s):.1f} tokens/s")
        if self.num_prompt_tokens is not None:
            cached = f", {self.num_cached_tokens} from the prefix cache" if self.num_cached_tokens else ""
            parts.append(f"{self.num_prompt_tokens} tokens in{cached}")
        if self.num_output_tokens is not None:
            parts.append(f"{self.num_output_tokens} tokens out")
        return "; ".join(parts)


def converse(
    client: httpx.Client, url: str, model: str, messages: list[Message], turn: Turn, **options: object
) -> Iterator[str]:
    """The answer's text piece by piece; fills `turn`.

    Raises: MxnError with the server's own message; UnavailableError when it cannot be reached or breaks off.
    """
    import httpx

    body = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in options.items() if value is not None},
    }
    turn.start_s = time.perf_counter()
    try:
        with client.stream("POST", f"{url}/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise MxnError(error_text(response.status_code, response.read()))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise MxnError(f"the server broke off: {chunk['error'].get('message')}")
                yield from _text(chunk, turn)
    except httpx.HTTPError as error:
        raise UnavailableError(f"{url} cannot be used: {error or type(error).__name__}") from error


def _text(chunk: dict[str, Any], turn: Turn) -> Iterator[str]:
    now_s = time.perf_counter()
    if usage := chunk.get("usage"):
        turn.num_prompt_tokens, turn.num_output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        turn.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    for choice in chunk.get("choices", []):
        turn.finish_reason = choice.get("finish_reason") or turn.finish_reason
        if text := (choice.get("delta") or {}).get("content"):
            turn.first_s = turn.first_s or now_s
            turn.end_s = now_s
            yield text


def http_client(api_key: str | None = None) -> httpx.Client:
    """A client for one server; no proxy is used for it."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(headers=headers, timeout=httpx.Timeout(600, connect=10), trust_env=False)


def get_json(client: httpx.Client, url: str) -> Any:
    """The JSON at `url`. Raises: UnavailableError or BackendError when there is none."""
    return _json_of(client, "GET", url)


def post_json(client: httpx.Client, url: str, body: dict[str, Any]) -> Any:
    """The JSON that answers `body`. Raises: UnavailableError or BackendError when there is none."""
    return _json_of(client, "POST", url, body)


def _json_of(client: httpx.Client, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    import httpx

    try:
        response = client.request(method, url, json=body)
        if response.status_code >= 400:
            raise BackendError(f"{url}: {error_text(response.status_code, response.content)}")
        return response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise UnavailableError(f"{url} cannot be read: {error or type(error).__name__}") from error


def error_text(status: int, body: bytes) -> str:
    """The message inside an OpenAI error object, or the beginning of whatever came."""
    try:
        return f"HTTP {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {body[:200].decode(errors='replace')}"
