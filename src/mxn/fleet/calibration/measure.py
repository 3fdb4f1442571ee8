"""Measures one cell on a running replica: prompts alone, sequences that decode together, watts.

Many sequences of one length begin together and are then ended in groups, so that one round of prompts yields a point at
every batch size. All points are visited in every round, so that a machine that grows slower meanwhile harms them alike.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from mxn import __version__
from mxn.backends.base import Backend
from mxn.config.chip_card import find_chip_card, load_chip_cards
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model
from mxn.core.request import SamplingParams, SequenceRequest
from mxn.energy.reader import PowerReader, Reading
from mxn.engine.messages import ReplicaInfo
from mxn.errors import BackendError
from mxn.fleet.calibration.profile import ChipRates, DecodePoint, Power, PrefillPoint, Profile
from mxn.fleet.replica import RunningReplica
from mxn.fleet.stream import SequenceStream

PREFILL_TOKENS = (16, 64, 192, 384, 768, 1536)
DECODE_CONTEXTS = (32, 384, 1280)
BATCHES = (16, 8, 2, 1)
GAPS = 12
"""Gaps between tokens that are timed at each batch size in a round."""
ROUNDS = 3
CALIBRATION = LoadSettings(max_num_seqs=BATCHES[0], prefix_cache=False)
"""How a cell is loaded to be measured: as it is served, with a cache that no prompt meets twice."""
_SETTLING = 2
"""Gaps that are not timed after sequences were ended: the replica may not have heard of it yet."""
_ROOM = 160
"""Tokens that a sequence has room for after its prompt, at least."""
_IDLE_S = 2.0

_SEQ_IDS = itertools.count(1)
"""Of all measurements: two may share a replica, whose sequences must not be taken for one another."""


@dataclass(slots=True)
class Samples:
    """Seconds of one point, over all rounds, and the context they were taken at."""

    seconds: list[float]
    contexts: list[float]
    watts: list[float]


class Measurement:
    """What was timed on one replica. seconds of prefill by tokens, and of decode by (batch, context) that was aimed at.

    together: seconds from the submission of several prompts to the last one's first token, by (prompts, tokens).
    """

    def __init__(self, replica: RunningReplica, info: ReplicaInfo, reader: PowerReader) -> None:
        self._replica, self._info, self._reader = replica, info, reader
        self._dice = random.Random(0)
        self.prefill: dict[int, list[float]] = {}
        self.decode: dict[tuple[int, int], Samples] = {}
        self.together: dict[tuple[int, int], list[float]] = {}

    async def visit(self, prompts: Sequence[int], contexts: Sequence[int], batches: Sequence[int]) -> None:
        """One round over all points that there is room for. batches: largest first."""
        cache_tokens = self._info.num_blocks * self._info.block_size or self._info.max_context
        for tokens in prompts:
            if tokens + 1 < self._info.max_context:
                await self.prompt_alone(tokens)
        for context in contexts:
            fitting = [batch for batch in batches if batch * (context + _ROOM) <= cache_tokens]
            if fitting and context + _ROOM < self._info.max_context:
                await self.decode_together(context, fitting)

    async def prompt_alone(self, num_tokens: int) -> None:
        """Times one prompt."""
        start_s = time.monotonic()
        await self._first_token(self._submit(num_tokens, 1))
        self.prefill.setdefault(num_tokens, []).append(time.monotonic() - start_s)

    async def decode_together(self, context: int, batches: Sequence[int]) -> None:
        """Starts the largest batch and ends sequences until the smallest is left, timing each batch on the way."""
        room, start_s = self._info.max_context - context - 1, time.monotonic()
        streams = [self._submit(context, room) for _ in range(batches[0])]
        tokens = [_Tokens(stream) for stream in streams]
        tasks = [asyncio.create_task(one.collect()) for one in tokens]
        try:
            await asyncio.gather(*(one.wait_for(1, task) for one, task in zip(tokens, tasks, strict=True)))
            self.together.setdefault((len(streams), context), []).append(time.monotonic() - start_s)
            for batch in batches:
                for one in tokens[batch:]:
                    one.stream.abort()
                await self._time(tokens[0], tasks[0], tokens[:batch], context)
        finally:
            for stream in streams:
                stream.abort()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _time(self, first: _Tokens, task: asyncio.Task[None], alive: list[_Tokens], context: int) -> None:
        begin = len(first.times_s) + _SETTLING
        await first.wait_for(begin + 1, task)
        before, lengths = self._reader.read(), [len(one.times_s) for one in alive]
        await first.wait_for(begin + 1 + GAPS, task)
        watts = _watts(before, self._reader.read())
        times = first.times_s[begin : begin + 1 + GAPS]
        samples = self.decode.setdefault((len(alive), context), Samples([], [], []))
        samples.seconds += [later - earlier for earlier, later in itertools.pairwise(times)]
        samples.contexts.append(context + statistics.mean(lengths) + GAPS / 2)
        if watts is not None:
            samples.watts.append(watts)

    async def _first_token(self, stream: SequenceStream) -> None:
        async for output in stream:
            if output.error is not None:
                raise BackendError(f"a prompt failed while it was measured: {output.error}")

    def _submit(self, num_tokens: int, max_tokens: int) -> SequenceStream:
        top = min(self._info.vocab_size, 32_000)
        prompt = [self._dice.randrange(top) for _ in range(num_tokens)]
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        seq_id = next(_SEQ_IDS)
        return self._replica.submit(SequenceRequest(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling))


class _Tokens:
    """When the tokens of a stream arrived; those that were read together are spread evenly since the one before."""

    def __init__(self, stream: SequenceStream) -> None:
        self.stream = stream
        self.times_s: list[float] = []
        self._came = asyncio.Event()

    async def collect(self) -> None:
        async for output in self.stream:
            if output.error is not None:
                raise BackendError(f"a sequence failed while it was measured: {output.error}")
            now_s, count = time.monotonic(), output.num_tokens
            before_s = self.times_s[-1] if self.times_s else now_s
            self.times_s += [before_s + (now_s - before_s) * number / count for number in range(1, count + 1)]
            self._came.set()

    async def wait_for(self, count: int, task: asyncio.Task[None]) -> None:
        """Returns when so many tokens have come. Raises: what ended the stream before."""
        while len(self.times_s) < count:
            self._came.clear()
            waiter = asyncio.create_task(self._came.wait())
            await asyncio.wait((waiter, task), return_when=asyncio.FIRST_COMPLETED)
            if task.done() and len(self.times_s) < count:
                waiter.cancel()
                task.result()
                raise BackendError(f"a sequence ended after {len(self.times_s)} tokens while it was measured")


async def measure_cell(
    replica: RunningReplica,
    *,
    backend: Backend,
    chip: Chip,
    model: Model,
    settings: LoadSettings,
    budget_s: float,
    rates: ChipRates | None = None,
    on_round: Callable[[int, float], None] = lambda number, seconds: None,
) -> Profile:
    """The profile of the cell that a replica, loaded with `settings` and otherwise idle, stands for.

    At most `ROUNDS` rounds, and none after the first that would not end within `budget_s`. What a short context leaves
    no room for is left out. Raises: BackendError when a sequence fails.
    """
    info = replica.info
    if info is None:
        raise BackendError("the replica is not ready")
    reader = backend.power(chip)
    try:
        begin_s = time.monotonic()
        idle_w = await _mean_watts(reader, asyncio.sleep(_IDLE_S))
        measurement = Measurement(replica, info, reader)
        batches = [batch for batch in BATCHES if batch <= settings.max_num_seqs]
        await measurement.prompt_alone(PREFILL_TOKENS[0])  # the first one meets cold caches
        measurement.prefill.clear()
        for number in range(1, ROUNDS + 1):
            start_s = time.monotonic()
            await measurement.visit(PREFILL_TOKENS, DECODE_CONTEXTS, batches)
            seconds = time.monotonic() - start_s
            on_round(number, seconds)
            if time.monotonic() - begin_s + 1.1 * seconds > budget_s:
                break
        return profile_of(measurement, info, backend, chip, model, settings, reader, idle_w, rates)
    finally:
        reader.close()


def profile_of(
    measurement: Measurement,
    info: ReplicaInfo,
    backend: Backend,
    chip: Chip,
    model: Model,
    settings: LoadSettings,
    reader: PowerReader,
    idle_w: float | None,
    rates: ChipRates | None,
) -> Profile:
    """The profile that a measurement amounts to."""
    card = find_chip_card(load_chip_cards(), chip.name)
    tokens = info.num_blocks * info.block_size
    elements = model.spec.kv_bytes_per_token(1.0)
    used = backend.memory_used(chip, info.pid)
    watts = [watt for samples in measurement.decode.values() for watt in samples.watts]
    return Profile(
        model=model.name,
        revision=model.revision,
        spec=model.spec,
        chip=chip.name,
        chip_cores=max(1, chip.cores),
        chip_kind=chip.kind or (card.id if card else None),
        backend=backend.name,
        versions={"mxn": __version__, **backend.probe().versions},
        quantisation=info.quantisation,
        attention=info.attention,
        program=info.program,
        threads=info.threads,
        max_step_tokens=settings.max_step_tokens,
        weight_bytes=float(info.weight_bytes or 0),
        kv_bytes=float(info.kv_bytes or 0),
        kv_bytes_per_token=info.kv_bytes / tokens if info.kv_bytes and tokens else 2.0 * elements,
        memory_bytes=used.value,
        memory_source=used.source,
        load_s=info.load_s,
        power=Power(
            source=reader.name,
            kind=str(reader.kind),
            detail=reader.detail,
            idle_w=idle_w,
            busy_w=max(watts) if watts else None,
        ),
        rates=rates,
        prefill=tuple(
            PrefillPoint(tokens=tokens, repetitions=len(seconds), **_spread(seconds))
            for tokens, seconds in sorted(measurement.prefill.items())
        ),
        decode=tuple(
            DecodePoint(
                batch=batch,
                context=statistics.mean(samples.contexts),
                repetitions=len(samples.seconds),
                watts=statistics.median(samples.watts) if samples.watts else None,
                **_spread(samples.seconds),
            )
            for (batch, _), samples in sorted(measurement.decode.items())
        ),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


async def _mean_watts(reader: PowerReader, work: Awaitable[None]) -> float | None:
    before = reader.read()
    await work
    return _watts(before, reader.read())


def _watts(before: Reading, after: Reading) -> float | None:
    """Mean watts between two readings; None when nobody can say."""
    if before.energy_j is None or after.energy_j is None or before.num_breaks != after.num_breaks:
        return None
    seconds = after.time_s - before.time_s
    return (after.energy_j - before.energy_j) / seconds if seconds > 0 else None
