"""What can be measured: anything that answers prompts. One HTTP server, or an engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from mxn.bench.client import CompletionsClient, RequestResult
from mxn.bench.http_stream import ConnectionPool
from mxn.bench.records import Subject
from mxn.energy.reader import PowerReader
from mxn.errors import ConfigError


class Arm(Protocol):
    """One side of a comparison."""

    subject: Subject
    readers: tuple[PowerReader, ...]

    async def run(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        """Answers all prompts, `concurrency` at a time, `max_tokens` each, greedy, not stopping at end of text."""

    def close(self) -> None:
        """Gives back what the arm holds. Safe to call twice."""


class HttpArm:
    """A server that speaks OpenAI's completions API."""

    def __init__(
        self,
        subject: Subject,
        base_url: str,
        *,
        readers: tuple[PowerReader, ...],
        api_key: str | None = None,
        extra: dict[str, object] | None = None,
    ) -> None:
        self.subject = subject
        self.readers = readers
        self._client = CompletionsClient(base_url, model=subject.model, api_key=api_key, extra=extra)

    async def run(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        return await self._client.run(prompts, max_tokens, concurrency)

    def close(self) -> None:
        self._client.close()


class _Listed(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Listed]


async def served_models(base_url: str, api_key: str | None = None) -> list[str]:
    """Names of the models that a server lists.

    Raises: TransportError when it cannot be reached; ConfigError when the answer is not a model list.
    """
    pool, parts = ConnectionPool(base_url.rstrip("/")), bytearray()
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        status = await pool.exchange(
            "GET", "/models", headers=headers, body=b"", sink=lambda data, _: parts.extend(data), timeout_s=30
        )
    finally:
        pool.close()
    try:
        if status != 200:
            raise ConfigError(f"{base_url}/models answers HTTP {status}: {parts[:200].decode(errors='replace')}")
        return [model.id for model in msgspec.json.decode(bytes(parts), type=_Models).data]
    except msgspec.DecodeError as err:
        raise ConfigError(f"{base_url}/models is not an OpenAI model list: {err}; does the URL end in /v1?") from err
