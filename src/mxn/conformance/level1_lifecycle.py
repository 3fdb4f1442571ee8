"""L1: replicas start, answer, are cancelled, drain and start again, and no sequence is lost or ends twice."""

from __future__ import annotations

import asyncio
import time

from mxn.conformance.result import CheckFailed, NotApplicable
from mxn.conformance.subject import STOP_LIMIT_S, Ask, Subject, info_of, prompt, require_equal
from mxn.core.request import FinishReason

ASKS = tuple(
    Ask(prompt(length), max_tokens=n) for length, n in ((1, 9), (15, 1), (16, 17), (33, 12), (90, 5), (130, 20))
)
CANCEL_LIMIT_S = 0.05
"""Steps may be shorter than messages travel; what is freed within this time counts as within two steps."""


async def a_replica_loads_and_says_what_it_chose(subject: Subject) -> str:
    info = info_of(await subject.replica())
    if not (info.attention and info.quantisation and info.device and info.vocab_size > 0):
        raise CheckFailed(f"it must say what it runs on and how: {info}")
    if info.max_context < 256:
        raise CheckFailed(f"it takes sequences of {info.max_context} tokens, with room for 512 asked for")
    seconds = sum(info.load_s.values())
    return f"{info.quantisation} on {info.device}, attention {info.attention}, {seconds:.1f} s to load"


async def every_sequence_ends_exactly_once(subject: Subject) -> str:
    replica = await subject.replica()
    found = await subject.run(replica, ASKS)
    for ask, one in zip(ASKS, found, strict=True):
        if one.finish_reason is FinishReason.LENGTH and one.num_tokens != ask.max_tokens:
            raise CheckFailed(f"asked for {ask.max_tokens} tokens, got {one.num_tokens}")
        if one.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP):
            raise CheckFailed(f"a sequence of {one.num_tokens} tokens ended by {one.finish_reason}")
    await asyncio.sleep(0.1)
    counts = [replica.num_ends[one.seq_id] for one in found]
    if counts != [1] * len(counts):
        raise CheckFailed(f"terminal messages per sequence: {counts}, expected one each")
    return f"{len(found)} sequences"


async def a_prompt_that_cannot_fit_is_refused_alone(subject: Subject) -> str:
    replica = await subject.replica()
    too_long = Ask(prompt(info_of(replica).max_context + 1))
    refused, served = await subject.run(replica, [too_long, Ask(prompt(20))], may_fail=True)
    if refused.finish_reason is not FinishReason.ERROR or not refused.error:
        raise CheckFailed(f"a prompt over the context ended by {refused.finish_reason}")
    if served.finish_reason is FinishReason.ERROR:
        raise CheckFailed(f"the sequence beside it failed: {served.error}")
    return ""


async def a_cancelled_sequence_is_freed_within_two_steps(subject: Subject) -> str:
    replica = await subject.replica()
    companion, stream = (subject.submit(replica, Ask(prompt(length), max_tokens=400)) for length in (8, 40))
    await anext(companion)
    while replica.stats.num_running < 2:
        await anext(stream)
    step, start_s = replica.stats.num_steps, time.monotonic()
    stream.abort()
    while replica.stats.num_running > 1 and time.monotonic() - start_s < 5.0:
        await asyncio.sleep(0.001)
    steps, seconds = replica.stats.num_steps - step, time.monotonic() - start_s
    companion.abort()
    if steps > 2 and seconds > CANCEL_LIMIT_S:
        raise CheckFailed(f"it held its place for {steps} steps ({seconds:.2f} s) after it was cancelled")
    return f"after {seconds * 1e3:.1f} ms"


async def a_replica_drains_and_starts_again_the_same(subject: Subject) -> str:
    asks = [Ask(prompt(30, salt=1), max_tokens=40), Ask(prompt(50, salt=2), max_tokens=40)]
    answers = []
    for _ in range(2):
        async with subject.own_replica() as replica:
            running = asyncio.create_task(subject.run(replica, asks))
            while replica.num_streams < len(asks):
                await asyncio.sleep(0)
            start_s = time.monotonic()
            await replica.stop(STOP_LIMIT_S)
            if time.monotonic() - start_s >= STOP_LIMIT_S:
                raise CheckFailed(f"it was still there {STOP_LIMIT_S:.0f} s after it was told to stop")
            answers.append(await running)
        if any(one.finish_reason is FinishReason.LENGTH and one.num_tokens != 40 for one in answers[-1]):
            raise CheckFailed("a sequence that ran when it was told to stop lost tokens")
    require_equal(answers[1], answers[0], "after the second start", "after the first")
    return ""


async def two_replicas_share_a_chip(subject: Subject) -> str:
    if not subject.capabilities.can_share_chip:
        raise NotApplicable("it declares that replicas do not share a chip")
    ask = Ask(prompt(25, salt=3))
    first = await subject.replica()
    async with subject.own_replica() as second:
        one, other = await asyncio.gather(subject.run(first, [ask]), subject.run(second, [ask]))
    require_equal(one, other, "from one replica", "from the other")
    require_equal(await subject.run(first, [ask]), one, "since the second replica ended", "before")
    return ""


CHECKS = (
    a_replica_loads_and_says_what_it_chose,
    every_sequence_ends_exactly_once,
    a_prompt_that_cannot_fit_is_refused_alone,
    a_cancelled_sequence_is_freed_within_two_steps,
    a_replica_drains_and_starts_again_the_same,
    two_replicas_share_a_chip,
)
