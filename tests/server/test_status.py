"""What /v1/mxn/status tells of deployments, replicas and chips."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from mxn.engine.tokenizer import Tokenizer
from mxn.fleet.deployment import Deployment
from mxn.fleet.spec import DeploymentSpec

from .conftest import Running

Start = Callable[..., Running]
Make = Callable[..., DeploymentSpec]


def test_every_replica_is_told_with_its_chip_state_and_reason(start_server: Start, fake_deployment: Make) -> None:
    good = fake_deployment("good")
    [placement] = good.placements
    other_chip = replace(placement.chips[0], uid="fake-1")
    two = replace(good, placements=[placement, replace(placement, id="good/1", chips=[other_chip])])
    broken = fake_deployment("broken", options={"fail_load": "weights.safetensors is truncated"})
    server = start_server(two, broken)
    server.wait_for(lambda: server.deployment("good").keepers[1].is_ready)
    found = server.http.get("/v1/mxn/status").json()
    assert [d["model"] for d in found["deployments"]] == ["good", "broken"]
    replicas = found["deployments"][0]["replicas"]
    assert [(r["id"], r["state"], r["chips"]) for r in replicas] == [
        ("good/0", "ready", ["fake-0"]),
        ("good/1", "ready", ["fake-1"]),
    ]
    assert replicas[0]["info"]["quantisation"] == "none"
    assert replicas[0]["stats"]["num_running"] == 0
    assert 0 <= replicas[0]["stats_age_s"] < 60
    [failed] = found["deployments"][1]["replicas"]
    assert failed["state"] == "failed"
    assert "truncated" in failed["reason"]
    chips = {chip["uid"]: chip for chip in found["chips"]}
    assert chips["fake-0"]["replicas"] == ["good/0", "broken/0"]
    assert chips["fake-1"]["replicas"] == ["good/1"]
    assert chips["fake-1"]["power_source"] == "scripted (simulated)"


async def test_the_phases_of_a_start_sum_to_the_time_it_took(fake_deployment: Make) -> None:
    spec = fake_deployment(options={"load_ms": 300})
    deployment = Deployment(spec, Tokenizer.load(spec.model.folder))
    began_s = time.monotonic()
    keeper = deployment.add(spec.placements[0])
    try:
        await keeper.wait_until_settled()
        took_s = time.monotonic() - began_s
        assert deployment.info is not None
        phases = deployment.info.load_s
        assert sum(phases.values()) == pytest.approx(took_s, abs=0.05)
        assert phases["weights"] >= 0.3
        assert 0 < phases["launch"] < took_s - 0.3  # the interpreter and its imports
    finally:
        await deployment.stop(0)
