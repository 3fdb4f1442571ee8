"""The load generator: sends conversations in a closed or an open loop, and watches its own limits while it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mxn.bench.arrivals import arrival_times
from mxn.bench.client import CompletionsClient, Message, RequestResult
from mxn.bench.workloads import PromptMaker, Workload
from mxn.config.datasets import MOONCAKE_BLOCK_TOKENS, Ask, Dataset

LAG_PROBE_S = 0.02
"""How often the event loop is asked whether it is late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One request of a conversation: the text that is new, put after all that was said before.

    prompt_tokens: what the server should count; None where that cannot be known.
    """

    text: str
    max_tokens: int
    prompt_tokens: int | None = None
    think_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Turns that follow one another. `at_s`: when the first is sent in an open loop. `is_chat`: sent as messages."""

    turns: tuple[Turn, ...]
    at_s: float = 0.0
    is_chat: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRun:
    """What a load did. begin_s, end_s: first request sent, last answer complete.

    lag_s: how late the generator's own event loop ran, one value per probe; large ones mean that it was the limit, not
    the server. cpu_s: processor time of this process.
    """

    results: list[RequestResult]
    begin_s: float
    end_s: float
    cpu_s: float
    lag_s: tuple[float, ...]


def plan(workload: Workload, prompts: PromptMaker, *, seed: int, dataset: Dataset | None = None) -> list[Session]:
    """The sessions of one repetition, with fresh prompts."""
    asks = dataset.asks[: workload.num_requests] if dataset is not None else [Ask()] * workload.num_requests
    shared = prompts.shared(workload.shared_tokens) if workload.shared_tokens else []
    if workload.arrival == "trace":
        times_s = _trace_times(asks, workload.rate_per_s)
    elif workload.is_open:
        times_s = arrival_times(
            workload.arrival, workload.rate_per_s or 0.0, len(asks), seed=seed, burstiness=workload.burstiness
        )
    else:
        times_s = [0.0] * len(asks)
    return [
        Session(turns=tuple(_turns(workload, prompts, ask, shared)), at_s=at_s, is_chat=workload.api == "chat")
        for ask, at_s in zip(asks, times_s, strict=True)
    ]


def _trace_times(asks: Sequence[Ask], rate_per_s: float | None) -> list[float]:
    """The trace's own times from its first request on, stretched or squeezed to a mean rate when one is given."""
    first_s = min(ask.at_s or 0.0 for ask in asks)
    times_s = [(ask.at_s or 0.0) - first_s for ask in asks]
    scale = (len(asks) - 1) / rate_per_s / max(times_s) if rate_per_s and max(times_s) > 0 else 1.0
    return [scale * at_s for at_s in times_s]


def _turns(workload: Workload, prompts: PromptMaker, ask: Ask, shared: list[int]) -> list[Turn]:
    turns = []
    for number in range(workload.turns):
        output = ask.output_tokens or prompts.length(workload.output_tokens, workload.length_spread)
        think_s = workload.think_s if number else 0.0
        if ask.text:
            turns.append(Turn(text=ask.text, max_tokens=output, think_s=think_s))
            continue
        count = ask.prompt_tokens or prompts.length(workload.prompt_tokens, workload.length_spread)
        front = list(shared) if number == 0 else []
        for block_id in ask.block_ids:
            front += prompts.block(block_id, min(MOONCAKE_BLOCK_TOKENS, max(count - len(front), 0)))
        text = prompts.text(count, shared=front, is_first=number == 0)
        known = None if number or workload.api == "chat" else count
        turns.append(Turn(text=text, max_tokens=output, prompt_tokens=known, think_s=think_s))
    return turns


async def drive(client: CompletionsClient, sessions: Sequence[Session], *, concurrency: int) -> LoadRun:
    """Sends all sessions. concurrency: how many at once in a closed loop; 0 sends each at its own time."""
    results: list[list[RequestResult]] = [[] for _ in sessions]
    lag_s: list[float] = []
    probe = asyncio.create_task(_probe_lag(lag_s))
    cpu_s, begin_s = time.process_time(), time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            if concurrency:
                waiting = iter(enumerate(sessions))

                async def worker() -> None:
                    for index, session in waiting:
                        await _run_session(client, session, results[index])

                for _ in range(min(concurrency, len(sessions))):
                    group.create_task(worker())
            else:
                for index, session in sorted(enumerate(sessions), key=lambda pair: pair[1].at_s):
                    await _sleep_until(begin_s + session.at_s)
                    group.create_task(_run_session(client, session, results[index], scheduled_s=begin_s + session.at_s))
    finally:
        probe.cancel()
    return LoadRun(
        results=[result for session_results in results for result in session_results],
        begin_s=begin_s,
        end_s=time.monotonic(),
        cpu_s=time.process_time() - cpu_s,
        lag_s=tuple(lag_s),
    )


async def _run_session(
    client: CompletionsClient, session: Session, into: list[RequestResult], *, scheduled_s: float | None = None
) -> None:
    """The turns of one conversation in order; one that fails ends it."""
    said, messages = "", list[Message]()
    is_talk = len(session.turns) > 1
    for turn in session.turns:
        if turn.think_s:
            await asyncio.sleep(turn.think_s)
        messages.append({"role": "user", "content": turn.text})
        prompt = messages if session.is_chat else said + turn.text
        result = await client.complete(prompt, turn.max_tokens, keeps_text=is_talk)
        into.append(replace(result, scheduled_s=scheduled_s, asked_prompt_tokens=turn.prompt_tokens))
        if result.error is not None:
            return
        said += turn.text + result.text
        messages.append({"role": "assistant", "content": result.text})
        scheduled_s = None


async def _sleep_until(at_s: float) -> None:
    """Sleeps, or only lets others run when it is time already."""
    await asyncio.sleep(max(at_s - time.monotonic(), 0.0))


async def _probe_lag(into: list[float]) -> None:
    while True:
        due_s = time.monotonic() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        into.append(max(time.monotonic() - due_s, 0.0))
