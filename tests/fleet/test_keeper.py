"""Keepers of real replica processes on the fake backend: hangs are told from long steps, and ended."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from mxn.core.request import SamplingParams, SequenceOutput, SequenceRequest
from mxn.errors import ReplicaDiedError
from mxn.fleet.keeper import Keeper
from mxn.fleet.launchers.local import LocalLauncher
from mxn.fleet.replica import RunningReplica
from mxn.fleet.spec import DeploymentSpec, PlacementSpec

Make = Callable[..., DeploymentSpec]


@asynccontextmanager
async def kept(spec: DeploymentSpec, lost: list[str] | None = None) -> AsyncIterator[Keeper]:
    def note(placement: PlacementSpec, reason: str) -> None:
        if lost is not None:
            lost.append(f"{placement.id}: {reason}")

    keeper = Keeper(spec, spec.placements[0], LocalLauncher(), on_chip_lost=note)
    keeper.start()
    try:
        await keeper.wait_until_settled()
        yield keeper
    finally:
        await keeper.stop(drain_s=0)


def replica_of(keeper: Keeper) -> RunningReplica:
    assert keeper.replica is not None
    return keeper.replica


def pid_of(keeper: Keeper) -> int:
    info = replica_of(keeper).info
    assert info is not None
    return info.pid


async def ask(keeper: Keeper, max_tokens: int = 2) -> list[SequenceOutput]:
    request = SequenceRequest(
        seq_id=1, prompt_token_ids=[1, 2, 3], sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens)
    )
    return [output async for output in replica_of(keeper).submit(request)]


async def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("has_work", [True, False])
async def test_a_stopped_process_is_ended_within_five_seconds_and_replaced(
    fake_deployment: Make, has_work: bool
) -> None:
    async with kept(fake_deployment(options={"step_ms": 5})) as keeper:
        pid = pid_of(keeper)
        asking = asyncio.create_task(ask(keeper, max_tokens=1500)) if has_work else None
        await asyncio.sleep(0.1)
        started_s = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        await wait_for(lambda: not keeper.is_ready)
        await wait_for(lambda: keeper.num_restarts == 1)
        assert time.monotonic() - started_s < 5.0
        if asking is not None:
            with pytest.raises(ReplicaDiedError):
                await asking
        await wait_for(lambda: keeper.is_ready)
        assert pid_of(keeper) != pid
        assert len(await ask(keeper)) >= 1


async def test_a_step_longer_than_any_silence_is_no_hang(fake_deployment: Make) -> None:
    async with kept(fake_deployment(options={"step_ms": 4600})) as keeper:
        pid = pid_of(keeper)
        outputs = await ask(keeper, max_tokens=1)
        assert [len(output.token_ids) for output in outputs] == [1]
        assert (keeper.num_restarts, pid_of(keeper)) == (0, pid)


async def test_steps_that_yield_no_token_are_progress(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"step_ms": 200}, max_step_tokens=1, stall_s=2.0)
    async with kept(spec) as keeper:
        request = SequenceRequest(
            seq_id=1, prompt_token_ids=[7] * 15, sampling=SamplingParams(temperature=0.0, max_tokens=1)
        )
        outputs = [output async for output in replica_of(keeper).submit(request)]
        assert outputs[-1].finish_reason is not None
        assert keeper.num_restarts == 0


async def test_a_step_that_never_ends_is_a_hang(fake_deployment: Make) -> None:
    async with kept(fake_deployment(options={"hang_after": 1}, stall_s=0.5)) as keeper:
        with pytest.raises(ReplicaDiedError):
            await ask(keeper)
        assert "ended no step" in keeper.reason
        await wait_for(lambda: keeper.num_restarts == 1 and keeper.is_ready)


async def test_a_lost_chip_is_told_upwards_and_the_replica_started_again(fake_deployment: Make) -> None:
    lost: list[str] = []
    async with kept(fake_deployment(options={"lose_chip_after": 1}), lost) as keeper:
        with pytest.raises(ReplicaDiedError, match="chip fake-0 is lost"):
            await ask(keeper)
        await wait_for(lambda: keeper.num_restarts == 1 and keeper.is_ready)
        [told] = lost
        assert told.startswith("fake-model/0: ")
        assert "chip fake-0 is lost" in told
