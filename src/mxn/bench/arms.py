"""What can be measured: anything that answers prompts. One HTTP server, or an engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from mxn.bench.client import CompletionsClient, RequestResult
from mxn.bench.load import LoadRun, Session, drive
from mxn.bench.quality import Answerer, Asker
from mxn.bench.queue import QueueTotals, ask_queue
from mxn.bench.records import Subject, config_of
from mxn.energy.reader import PowerReader
from mxn.engine.http_stream import ConnectionPool
from mxn.errors import ConfigError


class Arm(Protocol):
    """One side of a comparison."""

    subject: Subject
    readers: tuple[PowerReader, ...]

    async def run(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        """Answers all prompts, `concurrency` at a time, `max_tokens` each, greedy, not stopping at end of text."""

    def asker(self) -> Answerer:
        """For questions to the same subject apart from the load."""

    def close(self) -> None:
        """Gives back what the arm holds. Safe to call twice."""


@runtime_checkable
class LoadArm(Protocol):
    """An arm that takes any load: open loops, conversations, uneven requests."""

    async def drive(self, sessions: Sequence[Session], concurrency: int) -> LoadRun:
        """Sends all sessions, see `load.drive`."""


class HttpArm:
    """A server that speaks OpenAI's APIs."""

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
        self._base_url, self._api_key, self._model = base_url, api_key, subject.model
        self._client = CompletionsClient(base_url, model=subject.model, api_key=api_key, extra=extra)

    async def run(self, prompts: Sequence[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        return await self._client.run(prompts, max_tokens, concurrency)

    async def drive(self, sessions: Sequence[Session], concurrency: int) -> LoadRun:
        return await drive(self._client, sessions, concurrency=concurrency)

    async def queue(self) -> QueueTotals | None:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        return await ask_queue(self._base_url, self._model, headers)

    def asker(self) -> Asker:
        return Asker(self._base_url, model=self._model, api_key=self._api_key)

    def close(self) -> None:
        self._client.close()
        for reader in self.readers:
            reader.close()


class _Listed(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Listed]


class _Replica(msgspec.Struct):
    attention: str
    quantisation: str
    threads: int | None
    notes: list[str]
    program: str = "unknown"


class _Placed(msgspec.Struct):
    settings: dict[str, Any] = {}


class _Deployment(msgspec.Struct):
    model: str
    backend: str
    replica: _Replica | None
    replicas: list[_Placed] = []


class _Status(msgspec.Struct):
    deployments: list[_Deployment]


async def describe(base_url: str, label: str, *, model: str | None = None, api_key: str | None = None) -> Subject:
    """What a server serves: `model`, or the first one it lists; an mxn server also tells how it runs it.

    Raises: TransportError when it cannot be reached; ConfigError when it lists no such model.
    """
    pool = ConnectionPool(base_url.rstrip("/"))
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer, listed = await _get(pool, "/models", headers, _Models)
        if not isinstance(listed, _Models) or not listed.data:
            hint = "the server is not ready" if answer == 503 else "does the URL end in /v1?"
            raise ConfigError(f"{base_url}/models is not an OpenAI model list (HTTP {answer}); {hint}")
        names = [one.id for one in listed.data]
        if model is not None and model not in names:
            raise ConfigError(f"{base_url} does not serve {model}; it lists {', '.join(names)}")
        name = model or names[0]
        _, status = await _get(pool, "/mxn/status", headers, _Status)
    finally:
        pool.close()
    for deployment in status.deployments if isinstance(status, _Status) else ():
        replica = deployment.replica
        if deployment.model == name and replica is not None:
            return Subject(
                label=label,
                model=name,
                interface="HTTP",
                backend=deployment.backend,
                attention=replica.attention,
                quantisation=replica.quantisation,
                program=replica.program,
                threads=replica.threads,
                notes=tuple(replica.notes),
                config=config_of(deployment.replicas[0].settings) if deployment.replicas else (),
            )
    return Subject(label=label, model=name, interface="HTTP")


async def _get(pool: ConnectionPool, path: str, headers: dict[str, str], kind: type) -> tuple[int, object]:
    """The HTTP status, and the answer as `kind` or None when it is something else."""
    parts = bytearray()
    status = await pool.exchange(
        "GET", path, headers=headers, body=b"", sink=lambda data, _: parts.extend(data), timeout_s=30
    )
    try:
        return status, msgspec.json.decode(bytes(parts), type=kind) if status == 200 else None
    except msgspec.DecodeError:
        return status, None
