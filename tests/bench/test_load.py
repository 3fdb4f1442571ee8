"""The load generator against a server whose answers and delays are known."""

import asyncio
import json
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mxn.bench.arrivals import arrival_times
from mxn.bench.client import CompletionsClient
from mxn.bench.load import LoadRun, Session, Turn, drive, plan
from mxn.bench.workloads import PromptMaker, Workload
from mxn.config.datasets import Ask, Dataset
from mxn.errors import ConfigError


@asynccontextmanager
async def slow_server(delay_s: float, seen: list[Any]) -> AsyncIterator[CompletionsClient]:
    """Answers each completion with " x" repeated, after a fixed delay, whatever else is going on."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                request = json.loads(await reader.readexactly(length))
                seen.append(request["prompt"] if "prompt" in request else request["messages"])
                await asyncio.sleep(delay_s)
                count = request["max_tokens"]
                piece = {"text": " x"} if "prompt" in request else {"delta": {"content": " x"}}
                events = [{"choices": [piece]}] * count
                events.append({"choices": [], "usage": {"completion_tokens": count, "prompt_tokens": 3}})
                body = b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in events) + b"data: [DONE]\n\n"
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = CompletionsClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", model="m")
    try:
        yield client
    finally:
        client.close()
        server.close()


def one(at_s: float = 0.0) -> Session:
    return Session(turns=(Turn(text="hello", max_tokens=2, prompt_tokens=3),), at_s=at_s)


def in_flight_peak(run: LoadRun) -> int:
    changes = sorted([(r.start_s, 1) for r in run.results] + [(r.end_s, -1) for r in run.results])
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


async def test_closed_loop_never_has_more_in_flight_than_asked() -> None:
    async with slow_server(0.02, []) as client:
        run = await drive(client, [one()] * 12, concurrency=3)
    assert len(run.results) == 12
    assert in_flight_peak(run) == 3
    assert all(r.error is None and r.scheduled_s is None for r in run.results)


async def test_open_loop_does_not_wait_for_a_slow_server() -> None:
    async with slow_server(0.5, []) as client:
        run = await drive(client, [one(0.02 * i) for i in range(15)], concurrency=0)
    assert in_flight_peak(run) == 15
    late_s = [r.start_s - (r.scheduled_s or 0.0) for r in run.results]
    assert min(late_s) >= 0
    assert statistics.median(late_s) < 0.05
    assert run.results[-1].start_s - run.begin_s == pytest.approx(0.28, abs=0.1)


async def test_conversation_carries_what_was_said_and_waits_to_think() -> None:
    seen: list[str] = []
    turns = (
        Turn(text="first", max_tokens=2),
        Turn(text=" second", max_tokens=1, think_s=0.1),
        Turn(text=" third", max_tokens=1),
    )
    async with slow_server(0.0, seen) as client:
        run = await drive(client, [Session(turns=turns)], concurrency=1)
    assert seen == ["first", "first x x second", "first x x second x third"]
    assert run.results[1].start_s - run.results[0].end_s >= 0.1


async def test_conversation_over_chat_sends_both_sides_as_messages() -> None:
    seen: list[Any] = []
    turns = (Turn(text="first", max_tokens=2), Turn(text="second", max_tokens=1))
    async with slow_server(0.0, seen) as client:
        run = await drive(client, [Session(turns=turns, is_chat=True)], concurrency=1)
    user, answer = {"role": "user", "content": "first"}, {"role": "assistant", "content": " x x"}
    assert seen == [[user], [user, answer, {"role": "user", "content": "second"}]]
    assert all(r.error is None for r in run.results)


async def test_server_that_dies_mid_run_ends_every_request_with_its_kind() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.close()
        server.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = CompletionsClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", model="m")
    run = await asyncio.wait_for(drive(client, [one(0.02 * i) for i in range(5)], concurrency=0), 20)
    client.close()
    assert [r.error_kind for r in run.results] == ["connection"] * 5


@pytest.mark.parametrize(("kind", "burstiness", "cv"), [("poisson", 1, 1), ("gamma", 0.25, 2), ("constant", 1, 0)])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(kind: str, burstiness: float, cv: float) -> None:
    times_s = arrival_times(kind, 50, 20_000, seed=1, burstiness=burstiness)  # type: ignore[arg-type]
    gaps = [b - a for a, b in pairwise(times_s)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) * 50 == pytest.approx(cv, rel=0.05, abs=1e-6)
    assert times_s == arrival_times(kind, 50, 20_000, seed=1, burstiness=burstiness)  # type: ignore[arg-type]


def test_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        arrival_times("poisson", 0, 5, seed=0)


def workload(**fields: object) -> Workload:
    common: dict[str, object] = {
        "name": "w",
        "title": "w",
        "num_requests": 4,
        "prompt_tokens": 20,
        "output_tokens": 10,
        "concurrency": 2,
        "headline": "output_tokens_per_s",
    }
    return Workload(**{**common, **fields})  # type: ignore[arg-type]


@pytest.fixture
def prompts(tmp_path: Path, write_word_tokenizer: Callable[..., Path]) -> PromptMaker:
    return PromptMaker(write_word_tokenizer(tmp_path), seed=0)


def test_planned_prompts_have_exactly_the_tokens_they_say(prompts: PromptMaker) -> None:
    for session in plan(workload(num_requests=50, length_spread=0.5), prompts, seed=0):
        (turn,) = session.turns
        assert len(prompts.encode(turn.text)) == turn.prompt_tokens
        assert 10 <= (turn.prompt_tokens or 0) <= 30
        assert 5 <= turn.max_tokens <= 15


def test_requests_with_the_same_block_begin_alike(prompts: PromptMaker) -> None:
    asks = tuple(Ask(prompt_tokens=600, output_tokens=1, block_ids=(7, own), at_s=0.0) for own in (1, 2))
    data = Dataset(name="d", sha256="", asks=asks)
    shape = workload(num_requests=2, dataset="d", arrival="trace", concurrency=0)
    a, b = (prompts.encode(s.turns[0].text) for s in plan(shape, prompts, seed=0, dataset=data))
    assert len(a) == len(b) == 600
    assert a[:512] == b[:512]
    assert a[512:] != b[512:]
    again = plan(shape, prompts, seed=9, dataset=data)[0].turns[0].text
    assert prompts.encode(again)[:512] == a[:512]


def test_trace_keeps_its_rhythm_at_another_rate(prompts: PromptMaker) -> None:
    asks = tuple(Ask(prompt_tokens=5, output_tokens=1, at_s=100 + t) for t in (0.0, 1.0, 4.0))
    data = Dataset(name="d", sha256="", asks=asks)
    shape = workload(num_requests=3, dataset="d", arrival="trace", concurrency=0)
    assert [s.at_s for s in plan(shape, prompts, seed=0, dataset=data)] == [0, 1, 4]
    fast = workload(num_requests=3, dataset="d", arrival="trace", concurrency=0, rate_per_s=2.0)
    assert [s.at_s for s in plan(fast, prompts, seed=0, dataset=data)] == [0, 0.25, 1]
