"""Replicas that prepare the next step while the chip runs one: real processes on the fake backend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mxn.core.request import SamplingParams
from mxn.errors import ReplicaDiedError
from mxn.fleet.deployment import Deployment
from mxn.fleet.fleet import Fleet
from mxn.fleet.relay import RelayedStream
from mxn.fleet.spec import DeploymentSpec

Make = Callable[..., DeploymentSpec]
RULES = [
    SamplingParams(temperature=0.0, max_tokens=30),
    SamplingParams(temperature=1.0, seed=4, max_tokens=30, stop_token_ids=tuple(range(40))),
    SamplingParams(temperature=1.0, seed=5, max_tokens=9, num_logprobs=1),
]


async def answers(spec: DeploymentSpec) -> list[list[int]]:
    async def collect(deployment: Deployment, index: int, sampling: SamplingParams) -> list[int]:
        return [t async for output in deployment.submit([index, 1, 2], sampling) for t in output.token_ids]

    fleet = Fleet([spec])
    await fleet.start()
    try:
        deployment = fleet.deployments[0]
        return await asyncio.gather(*(collect(deployment, i, rules) for i, rules in enumerate(RULES)))
    finally:
        await fleet.stop(drain_s=0)


async def exhaust(stream: RelayedStream) -> None:
    async for _ in stream:
        pass


async def test_a_replica_that_takes_steps_ahead_answers_as_any_other(fake_deployment: Make) -> None:
    ahead, one_by_one = [await answers(fake_deployment(options={"ahead": mode})) for mode in ("on", "off")]
    assert ahead == one_by_one
    assert [len(ahead[0]), len(ahead[2])] == [30, 9]


async def test_a_chip_lost_under_way_is_told_to_those_it_served(fake_deployment: Make) -> None:
    fleet = Fleet([fake_deployment(options={"ahead": "on", "lose_chip_after": 3}, restart_delays_s=(30.0,))])
    await fleet.start()
    try:
        stream = fleet.deployments[0].submit([1, 2], RULES[0])
        with pytest.raises(ReplicaDiedError, match="chip fake-0 is lost"):
            await asyncio.wait_for(exhaust(stream), 20)
    finally:
        await fleet.stop(drain_s=0)
