"""L4: what a model costs on this chip through this backend, measured, for the planner. Nothing is judged here."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from mxn.conformance.subject import Ask, Subject, WatchedReplica, info_of, prompt
from mxn.core.model import Model
from mxn.energy.reader import PowerReader, ReaderKind

PREFILL_TOKENS = (64, 256)
DECODE_POINTS = tuple((batch, context) for batch in (1, 4, 16) for context in (32, 224))
DECODE_TOKENS = 24
REPETITIONS = 3
IDLE_S = 2.0


async def measure_profile(subject: Subject, model: Model) -> dict[str, Any]:
    """Load seconds, memory, prefill and decode points with their spread, and watts, of one model.

    prefill: seconds from submission to the first token of one prompt that no cache knows, by its tokens.
    decode: seconds between tokens with so many sequences of so much context, by (batch, context).
    """
    reader = subject.backend.power(subject.chip)
    settings = subject.profile_settings
    try:
        start_s = time.monotonic()
        async with subject.own_replica(model, settings) as replica:
            load_s = time.monotonic() - start_s
            info = info_of(replica)
            used = subject.backend.memory_used(subject.chip, info.pid)
            idle_w = await _watts(reader, asyncio.sleep(IDLE_S))
            return {
                "model": model.name,
                "revision": model.revision,
                "backend": subject.backend.name,
                "chip": subject.chip.uid,
                "quantisation": info.quantisation,
                "attention": info.attention,
                "load_s": load_s,
                "load_phases_s": info.load_s,
                "weight_bytes": info.weight_bytes,
                "kv_bytes": info.kv_bytes,
                "memory_used_bytes": {"value": used.value, "source": used.source},
                "power_source": {"name": reader.name, "kind": str(reader.kind), "detail": reader.detail},
                "idle_w": idle_w,
                "prefill": [await _prefill(subject, replica, n) for n in PREFILL_TOKENS if n < info.max_context],
                "decode": [
                    await _decode(subject, replica, reader, batch, context)
                    for batch, context in DECODE_POINTS
                    if batch <= settings.max_num_seqs and context + DECODE_TOKENS < info.max_context
                ],
                "repetitions": REPETITIONS,
            }
    finally:
        reader.close()


async def _prefill(subject: Subject, replica: WatchedReplica, num_tokens: int) -> dict[str, Any]:
    seconds = []
    for i in range(REPETITIONS):
        start_s = time.monotonic()
        await subject.run(replica, [Ask(prompt(num_tokens, salt=1000 + i), max_tokens=1)])
        seconds.append(time.monotonic() - start_s)
    return {"tokens": num_tokens, **_spread(seconds)}


async def _decode(
    subject: Subject, replica: WatchedReplica, reader: PowerReader, batch: int, context: int
) -> dict[str, Any]:
    gaps: list[float] = []

    async def load() -> None:
        for i in range(REPETITIONS):
            asks = [Ask(prompt(context, salt=2000 + 64 * i + j), max_tokens=DECODE_TOKENS) for j in range(batch)]
            gaps.append(max(await asyncio.gather(*(_gap(subject, replica, ask) for ask in asks))))

    watts = await _watts(reader, load())
    return {"batch": batch, "context": context, **_spread(gaps), "watts": watts}


async def _gap(subject: Subject, replica: WatchedReplica, ask: Ask) -> float:
    """Seconds for each token after the first."""
    stream, first_s, num_tokens, num_first = subject.submit(replica, ask), 0.0, 0, 0
    async for output in stream:
        num_tokens += output.num_tokens
        if not first_s and num_tokens:
            first_s, num_first = time.monotonic(), num_tokens
    return (time.monotonic() - first_s) / max(1, num_tokens - num_first)


async def _watts(reader: PowerReader, work: Any) -> float | None:
    """Mean watts while something is awaited; None when nobody can say."""
    before = reader.read()
    await work
    after = reader.read()
    if reader.kind is ReaderKind.NONE or before.energy_j is None or after.energy_j is None:
        return None
    if before.num_breaks != after.num_breaks or after.time_s <= before.time_s:
        return None
    return (after.energy_j - before.energy_j) / (after.time_s - before.time_s)


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
