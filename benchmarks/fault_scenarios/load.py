"""Clients that go on asking while things break, and hold every answer against the one of an undisturbed server."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mxn.bench.client import CompletionsClient
from mxn.bench.metrics import percentile
from mxn.engine.http_stream import ConnectionPool, TransportError

NUM_PROMPTS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of one request. outcome: ok, different, refused (429 or 503), broken (an error in a stream or
    another status) or reset (the connection ended)."""

    prompt: int
    is_streamed: bool
    begin_s: float
    end_s: float
    outcome: str
    detail: str = ""
    longest_gap_s: float = 0.0

    @property
    def took_s(self) -> float:
        return self.end_s - self.begin_s


@dataclass(slots=True)
class Load:
    """`num_clients` clients in a closed loop; every second request of each is streamed.

    Greedy and at a fixed length, so that each prompt has one right answer, which `learn` asks for.
    """

    url: str
    model: str
    num_clients: int = 16
    num_tokens: int = 100
    answers: list[Answer] = field(default_factory=list)
    right: dict[int, str] = field(default_factory=dict)

    async def learn(self) -> None:
        """Asks each prompt once while nothing breaks, four at a time."""
        client = CompletionsClient(self.url, model=self.model)
        indices = iter(range(NUM_PROMPTS))

        async def ask() -> None:
            for index in indices:
                result = await client.complete(prompt_of(index), self.num_tokens, keeps_text=True)
                if result.error is not None:
                    raise RuntimeError(f"the undisturbed server failed: {result.error}")
                self.right[index] = result.text

        try:
            await asyncio.gather(*(ask() for _ in range(4)))
        finally:
            client.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The clients ask until the block ends; then what they began is waited for."""
        stopping = asyncio.Event()
        tasks = [asyncio.create_task(self._client(number, stopping)) for number in range(self.num_clients)]
        try:
            yield
        finally:
            stopping.set()
            await asyncio.wait_for(asyncio.gather(*tasks), 120)

    def count(self, *outcomes: str) -> int:
        """Answers with one of these outcomes."""
        return sum(answer.outcome in outcomes for answer in self.answers)

    def details(self, limit: int = 3) -> list[str]:
        """What those that did not end well said, each text once."""
        return list(dict.fromkeys(a.detail for a in self.answers if a.outcome != "ok" and a.detail))[:limit]

    def longest_gap_s(self) -> float:
        """Between two pieces of a stream."""
        return max((answer.longest_gap_s for answer in self.answers), default=0.0)

    def latency_s(self, percent: float, *, since_s: float = 0.0, until_s: float = float("inf")) -> float:
        """Of answers that were right and asked for within that time."""
        times = [a.took_s for a in self.answers if a.outcome == "ok" and since_s <= a.begin_s < until_s]
        return percentile(times, percent) if times else float("nan")

    async def _client(self, number: int, stopping: asyncio.Event) -> None:
        client = CompletionsClient(self.url, model=self.model)
        pool = ConnectionPool(self.url)
        turn = number
        try:
            while not stopping.is_set():
                index, is_streamed = turn % NUM_PROMPTS, turn % 2 == 0
                turn += 7
                asked = self._stream(client, index) if is_streamed else self._whole(pool, index)
                answer = await asked
                self.answers.append(answer)
                if answer.outcome in ("refused", "reset"):
                    await asyncio.sleep(0.2)
        finally:
            client.close()
            pool.close()

    async def _stream(self, client: CompletionsClient, index: int) -> Answer:
        result = await client.complete(prompt_of(index), self.num_tokens, keeps_text=True)
        outcome = "ok"
        if result.error_kind is not None:
            kinds = {"http_429": "refused", "http_503": "refused", "connection": "reset"}
            outcome = kinds.get(result.error_kind, "broken")
        elif result.text != self.right[index]:
            outcome = "different"
        times = result.chunk_times_s
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return Answer(
            prompt=index,
            is_streamed=True,
            begin_s=result.start_s,
            end_s=result.end_s,
            outcome=outcome,
            detail=result.error or "",
            longest_gap_s=max(gaps, default=0.0),
        )

    async def _whole(self, pool: ConnectionPool, index: int) -> Answer:
        fields = {"model": self.model, "prompt": prompt_of(index), "max_tokens": self.num_tokens}
        body = json.dumps({**fields, "temperature": 0, "ignore_eos": True}).encode()
        parts, begin_s, detail = bytearray(), time.monotonic(), ""
        try:
            status = await pool.exchange(
                "POST",
                "/completions",
                headers={"Content-Type": "application/json"},
                body=body,
                sink=lambda data, _: parts.extend(data),
                timeout_s=120,
            )
        except TransportError as error:
            outcome, detail = "reset", str(error)
        else:
            if status == 200:
                text = json.loads(parts)["choices"][0]["text"]
                outcome = "ok" if text == self.right[index] else "different"
            else:
                outcome = "refused" if status in (429, 503) else "broken"
                detail = parts.decode(errors="replace")[:300]
        return Answer(
            prompt=index, is_streamed=False, begin_s=begin_s, end_s=time.monotonic(), outcome=outcome, detail=detail
        )


def prompt_of(index: int) -> str:
    """Prompts begin differently, so that a prefix cache does not make them one."""
    return f"{index} is the number of this question: what comes after it, and why? "
