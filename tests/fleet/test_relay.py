"""Sequences that outlive their replica: retried, continued with identical tokens, or ended with an error."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from mxn.core.request import FinishReason, SamplingParams, SequenceOutput
from mxn.errors import OverloadedError, ReplicaDiedError, UnavailableError
from mxn.fleet.deployment import Deployment
from mxn.fleet.fleet import Fleet
from mxn.fleet.keeper import Keeper
from mxn.fleet.relay import RelayedStream
from mxn.fleet.spec import DeploymentSpec

Make = Callable[..., DeploymentSpec]
GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=60)
UNSEEDED = SamplingParams(temperature=1.0, max_tokens=60)


@asynccontextmanager
async def running(spec: DeploymentSpec) -> AsyncIterator[Deployment]:
    fleet = Fleet([spec])
    await fleet.start()
    try:
        yield fleet.deployments[0]
    finally:
        await fleet.stop(drain_s=0)


async def collect(stream: RelayedStream) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    reason = None
    async for output in stream:
        tokens += output.token_ids
        reason = output.finish_reason
    return tokens, reason


async def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def holder(deployment: Deployment) -> Keeper:
    """The only replica that runs something."""
    [found] = [k for k in deployment.keepers if k.replica is not None and k.replica.num_streams]
    return found


def kill(keeper: Keeper) -> None:
    assert keeper.replica is not None
    assert keeper.replica.info is not None
    os.kill(keeper.replica.info.pid, signal.SIGKILL)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_a_stream_goes_on_elsewhere_with_the_tokens_of_an_unbroken_run(
    fake_deployment: Make, sampling: SamplingParams, num_replicas: int
) -> None:
    prompt = list(range(40))
    async with running(fake_deployment(options={"step_ms": 5}, num_replicas=num_replicas)) as deployment:
        expected = await collect(deployment.submit(prompt, sampling))
        stream = deployment.submit(prompt, sampling)
        head: list[int] = []
        while len(head) < 10:
            head += (await anext(stream)).token_ids
        kill(holder(deployment))
        tail, reason = await collect(stream)
        assert (head + tail, reason) == expected
        await wait_for(lambda: all(keeper.is_ready for keeper in deployment.keepers))


async def test_a_stream_survives_two_deaths_and_the_last_output_claims_no_joules(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 5}, num_replicas=2)) as deployment:
        expected, _ = await collect(deployment.submit([5, 6], GREEDY))
        stream = deployment.submit([5, 6], GREEDY)
        tokens: list[int] = []
        for count in (10, 30):
            while len(tokens) < count:
                tokens += (await anext(stream)).token_ids
            kill(holder(deployment))
        assert deployment.num_moves == 1
        outputs: list[SequenceOutput] = [output async for output in stream]
        assert tokens + [t for output in outputs for t in output.token_ids] == expected
        assert outputs[-1].energy_j is None
        assert deployment.num_moves == 2


async def test_an_unseeded_stream_goes_on_because_the_gateway_drew_its_seed(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 5}, num_replicas=2)) as deployment:
        stream = deployment.submit([1, 2, 3], UNSEEDED)
        head = (await anext(stream)).token_ids
        kill(holder(deployment))
        tail, reason = await collect(stream)
        assert len(head + tail) == 60
        assert reason is FinishReason.LENGTH
        again = SamplingParams(temperature=1.0, max_tokens=60, seed=stream.request.fallback_seed)
        assert (await collect(deployment.submit([1, 2, 3], again)))[0] == head + tail


async def test_many_sequences_lose_nothing_when_one_of_two_replicas_is_killed(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 3}, num_replicas=2, max_num_seqs=8)) as deployment:
        prompts = [[i, i + 1, i + 2] for i in range(30)]
        expected = await asyncio.gather(*(collect(deployment.submit(p, GREEDY)) for p in prompts))
        streams = [deployment.submit(prompt, GREEDY) for prompt in prompts]
        collecting = asyncio.gather(*map(collect, streams))
        await asyncio.sleep(0.1)
        kill(deployment.keepers[0])
        assert await collecting == expected
        assert deployment.num_waiting == 0


async def test_a_request_may_wait_for_the_replacement_of_the_only_replica(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"load_ms": 300})) as deployment:
        kill(deployment.keepers[0])
        await wait_for(lambda: not deployment.is_ready)
        assert deployment.accepts
        assert len((await collect(deployment.submit([1], GREEDY)))[0]) == 60


async def test_waiting_ends_with_the_loss_when_no_replacement_comes(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 5, "die_after": 3}, restart_delays_s=(0.0, 0.0))
    async with running(spec) as deployment:
        with pytest.raises(ReplicaDiedError, match="exit code 17"):
            await collect(deployment.submit([1], GREEDY))  # it is the bane of every replica
        await wait_for(lambda: deployment.state == "failed" or deployment.is_ready)


async def test_a_sequence_is_not_moved_again_without_a_token_in_between(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"lose_chip_after": 1}, num_replicas=3, max_step_tokens=4)
    async with running(spec) as deployment:
        with pytest.raises(ReplicaDiedError, match=r"chip fake-\d is lost"):
            await collect(deployment.submit(list(range(20)), GREEDY))  # dies within its prompt, twice
        assert deployment.num_moves == 1


async def test_those_in_line_are_told_when_they_have_waited_too_long(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 50}, max_num_seqs=1, max_queue=4, max_wait_s=0.3)
    async with running(spec) as deployment:
        streams = [deployment.submit([i], GREEDY) for i in range(4)]
        with pytest.raises(OverloadedError, match=r"waited 0\.3 s"):
            await collect(streams[-1])
        for stream in streams:
            stream.abort()
        await wait_for(lambda: deployment.stats.num_running == 0)
        assert deployment.num_waiting == 0


async def test_priority_goes_before_arrival_and_displaces_when_the_line_is_full(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 5}, max_num_seqs=1, max_queue=4)
    short = SamplingParams(temperature=0.0, max_tokens=10)
    async with running(spec) as deployment:
        order: list[str] = []

        async def ask(name: str, stream: RelayedStream) -> None:
            await collect(stream)
            order.append(name)

        streams = [deployment.submit([i], short, priority=5) for i in range(5)]
        urgent = deployment.submit([9], short, priority=0)
        tasks = [asyncio.create_task(ask(f"late {i}", stream)) for i, stream in enumerate(streams)]
        tasks.append(asyncio.create_task(ask("urgent", urgent)))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[4], OverloadedError)
        assert order == ["late 0", "late 1", "urgent", "late 2", "late 3"]


async def test_an_abort_in_line_leaves_it(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 20}, max_num_seqs=1)) as deployment:
        streams = [deployment.submit([i], GREEDY) for i in range(4)]
        assert deployment.num_waiting == 2
        streams[2].abort()
        assert [output async for output in streams[2]] == []
        assert deployment.num_waiting == 1
        streams[0].abort()
        await wait_for(lambda: deployment.num_waiting == 0)


async def test_stopping_serves_the_line_first(fake_deployment: Make) -> None:
    fleet = Fleet([fake_deployment(options={"step_ms": 2}, max_num_seqs=1)])
    await fleet.start()
    [deployment] = fleet.deployments
    tasks = [asyncio.create_task(collect(deployment.submit([i], GREEDY))) for i in range(6)]
    await asyncio.sleep(0.02)
    await fleet.stop(drain_s=20)
    assert {len(tokens) for tokens, _ in await asyncio.gather(*tasks)} == {60}


async def test_without_any_replica_on_the_way_nothing_waits(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"fail_load": "no weights"})) as deployment:
        assert not deployment.accepts
        with pytest.raises(UnavailableError, match="no weights"):
            deployment.submit([1], GREEDY)


async def test_time_in_line_is_part_of_the_queue_time_that_the_engine_tells(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 10}, max_num_seqs=1)
    short = SamplingParams(temperature=0.0, max_tokens=10)
    async with running(spec) as deployment:
        await asyncio.gather(*(collect(deployment.submit([i], short)) for i in range(5)))
        # They run one after another, 0.1 s each: the waits are 0, 0.1, 0.2, 0.3 and 0.4 s.
        assert deployment.stats.num_started == 5
        assert 0.9 < deployment.stats.queue_s < 3.0


async def test_a_full_line_is_told_before_any_work_is_done(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 20}, max_num_seqs=1, max_queue=2)
    async with running(spec) as deployment:
        deployment.check_line(0)
        streams = [deployment.submit([i], GREEDY, priority=5) for i in range(3)]
        with pytest.raises(OverloadedError):
            deployment.check_line(5)
        deployment.check_line(0)  # it would take another's place
        for stream in streams:
            stream.abort()
