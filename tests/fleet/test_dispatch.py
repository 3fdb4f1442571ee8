"""Several replicas behind one submit: real processes on the fake backend."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mxn.core.request import SamplingParams
from mxn.fleet.deployment import Deployment
from mxn.fleet.fleet import Fleet
from mxn.fleet.relay import RelayedStream
from mxn.fleet.spec import DeploymentSpec

Make = Callable[..., DeploymentSpec]
SHORT = SamplingParams(temperature=0.0, max_tokens=4)
LONG = SamplingParams(temperature=0.0, max_tokens=200)


@asynccontextmanager
async def running(spec: DeploymentSpec) -> AsyncIterator[Deployment]:
    fleet = Fleet([spec])
    await fleet.start()
    try:
        yield fleet.deployments[0]
    finally:
        await fleet.stop(drain_s=0)


async def finish(stream: RelayedStream) -> int:
    return sum([len(output.token_ids) async for output in stream])


def num_finished(deployment: Deployment) -> dict[str, int]:
    return {k.id: k.replica.stats.num_finished for k in deployment.keepers if k.replica is not None}


def num_streams(deployment: Deployment) -> list[int]:
    return [k.replica.num_streams for k in deployment.keepers if k.replica is not None]


async def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_equal_replicas_share_the_work(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 5}, num_replicas=3, max_num_seqs=64)) as deployment:
        streams = [deployment.submit([i] * 20, LONG) for i in range(30)]
        counts = num_streams(deployment)
        assert sum(counts) == 30
        assert max(counts) - min(counts) <= 1
        for stream in streams:
            stream.abort()


async def test_a_conversation_comes_back_to_the_replica_that_holds_its_prefix(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"token_us": 500, "step_ms": 1}, num_replicas=3)) as deployment:
        for tenant in ("a", "b"):
            before = num_finished(deployment)
            prompt = [17] * 160
            for turn in range(6):
                await finish(deployment.submit(prompt, SHORT, cache_salt=tenant))
                prompt = prompt + [turn] * 32
            await wait_for(lambda before=before: sum(num_finished(deployment).values()) == sum(before.values()) + 6)  # type: ignore[misc]
            gained = Counter(num_finished(deployment)) - Counter(before)
            assert list(gained.values()) == [6]
        assert deployment.stats.num_cached_tokens >= 2 * 5 * 144


async def test_what_has_no_room_waits_for_whichever_replica_is_free_first(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 2}, num_replicas=2, max_num_seqs=4)
    async with running(spec) as deployment:
        tasks = [asyncio.create_task(finish(deployment.submit([i], LONG))) for i in range(40)]
        await asyncio.sleep(0.05)
        assert num_streams(deployment) == [5, 5]
        assert deployment.num_waiting == 30
        assert await asyncio.gather(*tasks) == [200] * 40
        assert min(num_finished(deployment).values()) > 10


async def test_a_replica_can_be_added_and_removed_under_load(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 2}, num_replicas=2)
    fleet = Fleet([spec])
    [deployment] = fleet.deployments
    first, second = spec.placements
    await deployment.add(first).wait_until_settled()
    try:
        tasks = [asyncio.create_task(finish(deployment.submit([i], LONG))) for i in range(20)]
        await deployment.add(second).wait_until_settled()
        tasks += [asyncio.create_task(finish(deployment.submit([i], LONG))) for i in range(20)]
        await asyncio.sleep(0.05)
        assert min(num_streams(deployment)) > 0
        await deployment.remove(first.id, drain_s=20)
        tasks += [asyncio.create_task(finish(deployment.submit([i], LONG))) for i in range(5)]
        assert await asyncio.gather(*tasks) == [200] * 45
        assert [keeper.id for keeper in deployment.keepers] == [second.id]
    finally:
        await deployment.stop(drain_s=0)


async def test_a_stopped_replica_gets_nothing_new_and_its_sequences_move(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 2}, num_replicas=2)) as deployment:
        tasks = [asyncio.create_task(finish(deployment.submit([i], LONG))) for i in range(8)]
        await asyncio.sleep(0.05)
        hung = deployment.keepers[0]
        assert hung.replica is not None
        assert hung.replica.info is not None
        os.kill(hung.replica.info.pid, signal.SIGSTOP)
        await wait_for(lambda: not hung.is_ready)
        held = hung.replica.num_streams
        assert await finish(deployment.submit([9], SHORT)) == 4
        assert hung.replica.num_streams == held
        assert await asyncio.gather(*tasks) == [200] * 8
