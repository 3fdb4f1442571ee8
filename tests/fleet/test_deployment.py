"""Deployments with real replica processes on the fake backend."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from mxn.backends.fake import fake_next_token
from mxn.core.request import FinishReason, SamplingParams
from mxn.errors import ConfigError, OverloadedError, ReplicaDiedError, RequestError, UnavailableError
from mxn.fleet.deployment import Deployment
from mxn.fleet.fleet import Fleet
from mxn.fleet.spec import DeploymentSpec
from mxn.fleet.stream import SequenceStream

Make = Callable[..., DeploymentSpec]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@asynccontextmanager
async def running(*specs: DeploymentSpec) -> AsyncIterator[list[Deployment]]:
    fleet = Fleet(specs)
    await fleet.start()
    try:
        yield fleet.deployments
    finally:
        await fleet.stop(drain_s=5)


async def collect(stream: SequenceStream) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    reason = None
    async for output in stream:
        tokens += output.token_ids
        reason = output.finish_reason
    return tokens, reason


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(fake_next_token(np.asarray(ids, dtype=np.int32), 0, 259))
    return ids[len(prompt) :]


async def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_sequences_stream_from_a_real_process_and_blocks_come_back(fake_deployment: Make) -> None:
    async with running(fake_deployment()) as [deployment]:
        prompts = [[i % 256 for i in range(start, start + 40)] for start in range(6)]
        results = await asyncio.gather(*(collect(deployment.submit(p, GREEDY)) for p in prompts))
        assert [tokens for tokens, _ in results] == [expected_tokens(p, 8) for p in prompts]
        assert {reason for _, reason in results} == {FinishReason.LENGTH}
        assert deployment.stats.num_free_blocks == deployment.stats.num_total_blocks
        assert deployment.info is not None
        assert deployment.info.pid != os.getpid()


async def test_an_aborted_stream_gives_its_blocks_back_while_a_neighbour_goes_on(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 5})) as [deployment]:
        long = SamplingParams(temperature=0.0, max_tokens=1000)
        neighbour = asyncio.create_task(collect(deployment.submit([1, 2, 3], GREEDY)))
        stream = deployment.submit(list(range(100)), long)
        await anext(stream)
        stream.abort()
        assert [output async for output in stream] == []
        tokens, _ = await neighbour
        assert tokens == expected_tokens([1, 2, 3], 8)
        await wait_for(lambda: deployment.stats.num_free_blocks == deployment.stats.num_total_blocks)
        assert deployment.stats.num_aborted == 1


async def test_a_full_queue_is_refused_with_a_time_to_retry(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"step_ms": 20}, max_num_seqs=1, max_queue=1)) as [deployment]:
        streams = [deployment.submit([1], GREEDY) for _ in range(2)]
        with pytest.raises(OverloadedError, match="2 sequences in line") as caught:
            deployment.submit([1], GREEDY)
        assert caught.value.retry_after_s >= 1
        assert [len((await collect(s))[0]) for s in streams] == [8, 8]
        assert len((await collect(deployment.submit([1], GREEDY)))[0]) == 8


async def test_a_killed_replica_is_replaced(fake_deployment: Make) -> None:
    async with running(fake_deployment()) as [deployment]:
        assert deployment.info is not None
        pid = deployment.info.pid
        os.kill(pid, signal.SIGKILL)
        await wait_for(lambda: deployment.num_restarts == 1 and deployment.is_ready)
        assert deployment.info.pid != pid
        assert (await collect(deployment.submit([1, 2], GREEDY)))[0] == expected_tokens([1, 2], 8)


async def test_a_step_that_raises_ends_only_the_guilty_sequence(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"raise_on": 77, "step_ms": 2})) as [deployment]:
        good = [asyncio.create_task(collect(deployment.submit([i, 5], GREEDY))) for i in range(3)]
        guilty = [output async for output in deployment.submit([77], GREEDY)]
        assert guilty[-1].finish_reason is FinishReason.ERROR
        assert "RuntimeError" in (guilty[-1].error or "")
        for i, task in enumerate(good):
            tokens, reason = await task
            # Tokens of the fake chip may themselves contain 77; then the sequence ends there.
            if reason is not FinishReason.ERROR:
                assert tokens == expected_tokens([i, 5], 8)
        assert deployment.state == "ready"


async def test_a_load_failure_is_final_and_tells_the_cause(fake_deployment: Make) -> None:
    async with running(fake_deployment(options={"fail_load": "no such weights"})) as [deployment]:
        assert deployment.state == "failed"
        assert deployment.reason == "no such weights"
        with pytest.raises(UnavailableError, match="no such weights"):
            deployment.submit([1], GREEDY)


async def test_a_lost_chip_ends_the_replica_with_its_reason(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"lose_chip_after": 2}, restart_delays_s=())
    async with running(spec) as [deployment]:
        with pytest.raises(ReplicaDiedError, match="chip fake-0 is lost"):
            await collect(deployment.submit([1], GREEDY))
        await wait_for(lambda: deployment.state == "failed")
        assert "chip fake-0 is lost" in deployment.reason


async def test_stopping_lets_running_sequences_finish(fake_deployment: Make) -> None:
    fleet = Fleet([fake_deployment(options={"step_ms": 10})])
    await fleet.start()
    [deployment] = fleet.deployments
    task = asyncio.create_task(collect(deployment.submit([9, 9], GREEDY)))
    await asyncio.sleep(0.02)
    await fleet.stop(drain_s=10)
    assert (await task)[0] == expected_tokens([9, 9], 8)
    assert deployment.state == "stopped"


async def test_a_prompt_that_leaves_no_room_is_refused_by_name(fake_deployment: Make) -> None:
    async with running(fake_deployment(context_length=64)) as [deployment]:
        with pytest.raises(RequestError, match="64") as caught:
            deployment.submit(list(range(64)), GREEDY)
        assert caught.value.param == "prompt"


async def test_a_slow_reader_gets_merged_outputs(fake_deployment: Make) -> None:
    async with running(fake_deployment()) as [deployment]:
        stream = deployment.submit([4], GREEDY)
        await wait_for(lambda: deployment.stats.num_finished == 1)
        outputs = [output async for output in stream]
        assert len(outputs) == 1
        assert outputs[0].token_ids == expected_tokens([4], 8)


def test_two_deployments_of_one_name_are_refused(fake_deployment: Make) -> None:
    with pytest.raises(ConfigError, match="fake-model"):
        Fleet([fake_deployment(), fake_deployment()])
