"""L2: what the backend reports of memory and energy is what happens. Unknown is said to be unknown, never zero."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from mxn.conformance.result import CheckFailed, NotApplicable
from mxn.conformance.subject import USUAL, Ask, Subject, WatchedReplica, info_of, prompt
from mxn.core.quantity import Provenance
from mxn.energy.reader import PowerReader, ReaderKind, Reading

TOLERANCE = 0.05
MEBIBYTE = 2**20
SMALL_KV, LARGE_KV = 32 * MEBIBYTE, 288 * MEBIBYTE
"""Far enough apart that 5 % of the difference is more than two starts of the same program differ by."""

ROOMY = replace(USUAL, block_size=1024, context_length=4096, max_num_seqs=256)
"""Few large blocks or slots, so that the cache is measured and not the books about it, and enough to fill it."""


async def memory_in_use_moves_by_what_was_allocated(subject: Subject) -> str:
    reported, measured = [], []
    for kv_bytes in (SMALL_KV, LARGE_KV):
        settings = replace(ROOMY, quantisation=subject.precise.quantisation, kv_bytes=kv_bytes)
        async with subject.own_replica(settings=settings) as replica:
            info = info_of(replica)
            used = subject.backend.memory_used(subject.chip, info.pid)
            if used.value is None:
                raise NotApplicable(f"no memory meter: {used.source}")
            if info.weight_bytes is None or info.kv_bytes is None:
                raise NotApplicable("it does not say how much memory it took")
            reported.append(info.weight_bytes + info.kv_bytes)
            measured.append(used.value)
    moved, said = measured[1] - measured[0], reported[1] - reported[0]
    text = f"{moved / MEBIBYTE:.1f} MiB more in use for {said / MEBIBYTE:.1f} MiB more reported"
    if said < (LARGE_KV - SMALL_KV) / 2:
        raise CheckFailed(f"it was given {(LARGE_KV - SMALL_KV) / MEBIBYTE:.0f} MiB more for the KV cache: {text}")
    if abs(moved - said) > TOLERANCE * said:
        raise CheckFailed(f"{text}, more than {TOLERANCE:.0%} apart")
    return text


async def the_estimate_of_the_kv_cache_is_what_was_taken(subject: Subject) -> str:
    model, settings = subject.runnable[0], subject.precise
    estimate = subject.backend.estimate(model.spec, settings, subject.chip).kv_cache
    if estimate.value is None:
        raise NotApplicable(f"the KV cache is not estimated: {estimate.source}")
    taken = info_of(await subject.replica()).kv_bytes
    if taken is None:
        raise NotApplicable("it does not say how much memory it took")
    if abs(estimate.value - taken) > TOLERANCE * max(taken, 1):
        raise CheckFailed(f"{estimate.value:.0f} bytes estimated, {taken} taken")
    return f"{taken} bytes"


async def what_is_unknown_is_not_zero(subject: Subject) -> str:
    spec = replace(subject.runnable[0].spec, num_parameters=None)
    estimate = subject.backend.estimate(spec, USUAL, subject.chip)
    for name in ("weights", "kv_cache", "activations", "overhead"):
        part = getattr(estimate, name)
        if part.value is not None and part.value <= 0 and part.provenance is not Provenance.SIMULATED:
            raise CheckFailed(f"{name} of a model of unknown size: {part.value:g} {part.unit} ({part.provenance})")
    reader = subject.backend.power(subject.chip)
    try:
        reading = reader.read()
    finally:
        reader.close()
    if not reader.detail:
        raise CheckFailed("the power reader does not say what it reads")
    if reading.energy_j is None and not reading.reason:
        raise CheckFailed("there is no energy, and no reason why")
    if reader.kind is ReaderKind.NONE and reading.energy_j is not None:
        raise CheckFailed(f"the reader has no source and shows {reading.energy_j:g} J")
    return ""


async def energy_rises_and_is_higher_under_load(subject: Subject) -> str:
    reader = subject.backend.power(subject.chip)
    try:
        if reader.kind is ReaderKind.NONE:
            raise NotApplicable(f"no power source: {reader.detail}")
        replica = await subject.replica()
        window_s = max(1.0, 4 * reader.update_period_s)
        idle = await _watch(reader, window_s)
        stop = asyncio.Event()
        load = asyncio.create_task(_keep_busy(subject, replica, stop))
        await asyncio.sleep(0.2)
        halves = [await _watch(reader, window_s), await _watch(reader, window_s)]
        stop.set()
        await load
    finally:
        reader.close()
    idle_w, *busy_w = (_watts(readings) for readings in (idle, *halves))
    text = f"{idle_w:.2f} W idle, {busy_w[0]:.2f} and {busy_w[1]:.2f} W under load ({reader.name}, {reader.kind})"
    if min(busy_w) <= 0:
        raise CheckFailed(f"a source that shows nothing must say that it is unavailable: {text}")
    if idle_w > 1.05 * max(busy_w):
        raise CheckFailed(f"more when idle than under load: {text}")
    if max(busy_w) > 1.5 * min(busy_w):
        raise CheckFailed(f"two halves of the same load differ by more than half: {text}")
    return text


CHECKS = (
    memory_in_use_moves_by_what_was_allocated,
    the_estimate_of_the_kv_cache_is_what_was_taken,
    what_is_unknown_is_not_zero,
    energy_rises_and_is_higher_under_load,
)


async def _watch(reader: PowerReader, seconds: float) -> list[Reading]:
    readings = [reader.read()]
    for _ in range(20):
        await asyncio.sleep(seconds / 20)
        readings.append(reader.read())
    return readings


def _watts(readings: Sequence[Reading]) -> float:
    """Mean watts over readings. Raises: CheckFailed when energy or time goes back, or a reading is missing."""
    for before, after in pairwise(readings):
        if before.energy_j is None or after.energy_j is None:
            raise CheckFailed(f"a reading is missing: {after.reason or before.reason}")
        if after.num_breaks == before.num_breaks and after.energy_j < before.energy_j:
            raise CheckFailed(f"energy went back from {before.energy_j:.3f} J to {after.energy_j:.3f} J")
        if after.time_s < before.time_s:
            raise CheckFailed(f"its time went back from {before.time_s:.3f} s to {after.time_s:.3f} s")
    first, last = readings[0], readings[-1]
    if last.time_s <= first.time_s:
        raise CheckFailed("its time stands still")
    return ((last.energy_j or 0.0) - (first.energy_j or 0.0)) / (last.time_s - first.time_s)


async def _keep_busy(subject: Subject, replica: WatchedReplica, stop: asyncio.Event) -> None:
    while not stop.is_set():
        await subject.run(replica, [Ask(prompt(64, salt=i), max_tokens=60) for i in range(8)])
