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


def test_explain_tells_why_and_where_a_prompt_would_go(start_server: Start, fake_deployment: Make) -> None:
    spec = fake_deployment("good", options={"step_ms": 5})
    [placement] = spec.placements
    placements = [
        replace(placement, id=f"good/{i}", why=f"reason {i}", chips=[replace(placement.chips[0], uid=f"fake-{i}")])
        for i in range(2)
    ]
    server = start_server(replace(spec, placements=placements))
    server.wait_for(lambda: all(keeper.is_ready for keeper in server.deployment("good").keepers))
    prompt = "x" * 64
    for _ in range(6):  # the first go to both, until a replica is known to hold the prompt
        server.post("/v1/completions", {"model": "good", "prompt": prompt, "max_tokens": 20, "ignore_eos": True})
    found = server.post("/v1/mxn/explain", {"model": "good", "prompt": prompt}).json()
    assert [p["why"] for p in found["placements"]] == ["reason 0", "reason 1"]
    assert found["placements"][0]["measured"].keys() == {"output_tokens_per_s", "joules_per_token"}
    routing = {one["replica"]: one for one in found["routing"]}
    assert routing.keys() == {"good/0", "good/1"}
    [chosen] = [one for one in routing.values() if one["is_chosen"]]
    assert chosen["first_token_s"] == min(one["first_token_s"] for one in routing.values())
    assert chosen["cached_tokens"] >= 48
    assert "routing" not in server.post("/v1/mxn/explain", {"model": "good"}).json()
    assert server.post("/v1/mxn/explain", {"model": "other"}).status_code == 404


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
