"""What /metrics says, and that clients cannot make it grow."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mxn.backends.fake import FAKE_W
from mxn.fleet.spec import DeploymentSpec
from mxn.server.settings import ServerSettings

from .conftest import SCRIPT, Running
from .test_generation import events_of

Start = Callable[..., Running]
Make = Callable[..., DeploymentSpec]
OWN = "model=fake-model"


def samples(server: Running) -> dict[tuple[str, str], float]:
    """(name, labels as text) -> value."""
    text = server.http.get("/metrics").text
    return {
        (sample.name, ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_request_moves_its_counters_and_histograms(server: Running) -> None:
    before = samples(server)
    server.post("/v1/completions", {"model": "fake-model", "prompt": "abcd", "max_tokens": 50})
    after = samples(server)

    def grew(name: str, labels: str = "model=fake-model") -> float:
        return after[name, labels] - before.get((name, labels), 0.0)

    assert grew("mxn_prompt_tokens_total") == 4
    assert grew("mxn_output_tokens_total") == len(SCRIPT) + 1
    assert grew("mxn_requests_total", "model=fake-model,outcome=stop") == 1
    assert grew("mxn_time_to_first_token_seconds_count") == 1
    assert grew("mxn_request_duration_seconds_count") == 1
    replica = "model=fake-model,replica=fake-model/0"
    assert grew("mxn_engine_output_tokens_total", replica) == len(SCRIPT) + 1
    assert grew("mxn_engine_steps_total", replica) >= len(SCRIPT)
    assert grew("mxn_http_requests_total", "method=POST,route=/v1/completions,status=200") == 1


def test_gauges_and_facts_of_deployments_are_there(server: Running) -> None:
    found = samples(server)
    names = {name for name, _ in found}
    assert {
        "mxn_sequences_running",
        "mxn_sequences_waiting",
        "mxn_kv_blocks",
        "mxn_kv_blocks_free",
        "mxn_kv_cache_usage_ratio",
        "mxn_engine_sequences_aborted_total",
        "mxn_engine_sequences_failed_total",
        "mxn_cached_tokens_total",
        "mxn_build_info",
        "mxn_http_requests_active",
    } <= names
    assert found["mxn_deployment_ready", "model=fake-model"] == 1
    assert found["mxn_replicas", "model=fake-model,state=ready"] == 1
    assert found["mxn_replicas", "model=fake-model,state=failed"] == 0
    assert found["mxn_kv_blocks", "model=fake-model,replica=fake-model/0"] > 0
    info = next(labels for name, labels in found if name == "mxn_replica_info" and "fake-model" in labels)
    assert "backend=fake" in info


def test_unknown_models_routes_and_methods_add_no_series(server: Running) -> None:
    server.post("/v1/completions", {"model": "x", "prompt": "a"})
    server.http.get("/v1/models/x")
    server.http.get("/unknown")
    server.http.request("BREW", "/livez")
    samples(server)
    before = set(samples(server))
    for i in range(200):
        server.post("/v1/completions", {"model": f"model-{i}", "prompt": "a"})
        server.http.get(f"/v1/models/model-{i}")
        server.http.get(f"/unknown-{i}")
        server.http.request(f"M{i}", "/livez")
    assert set(samples(server)) == before


def test_series_grow_with_replicas_and_deployments_only(start_server: Start, fake_deployment: Make) -> None:
    one = fake_deployment("one")
    [placement] = one.placements
    three = replace(one, name="three", placements=[replace(placement, id=f"three/{i}") for i in range(3)])
    server = start_server(one, three)
    server.wait_for(lambda: all(k.is_ready for d in server.fleet.deployments for k in d.keepers))
    own = [
        name for name, labels in samples(server) if "replica=" in labels or name.startswith(("mxn_deploy", "mxn_repl"))
    ]
    assert len(own) <= 12 * 2 + 33 * 4
    assert len({labels for name, labels in samples(server) if name == "mxn_replica_ready"}) == 4


def test_vllms_names_tell_what_mxns_own_tell(start_server: Start, fake_deployment: Make) -> None:
    server = start_server(fake_deployment(), settings=ServerSettings(vllm_metrics=True))
    server.post("/v1/completions", {"model": "fake-model", "prompt": "abcd", "max_tokens": 5, "ignore_eos": True})
    found = samples(server)
    name = "model_name=fake-model"
    assert found["vllm:num_requests_running", name] == 0
    assert found["vllm:num_requests_waiting", name] == 0
    assert found["vllm:kv_cache_usage_perc", name] == found["vllm:gpu_cache_usage_perc", name] < 1
    assert found["vllm:prompt_tokens_total", name] == 4
    assert found["vllm:generation_tokens_total", name] == 5
    assert found["vllm:time_to_first_token_seconds_count", name] == 1
    assert found["vllm:inter_token_latency_seconds_count", name] == found["mxn_inter_token_latency_seconds_count", OWN]
    assert found["vllm:e2e_request_latency_seconds_sum", name] == found["mxn_request_duration_seconds_sum", OWN]
    assert found["vllm:request_success_total", f"finished_reason=length,{name}"] == 1
    [config] = [labels for family, labels in found if family == "vllm:cache_config_info"]
    blocks = found["mxn_kv_blocks", f"{OWN},replica=fake-model/0"]
    assert f"num_gpu_blocks={blocks:.0f}" in config
    assert "block_size=16" in config


def test_vllms_names_are_not_told_unless_asked_for(server: Running) -> None:
    assert "vllm:" not in server.http.get("/metrics").text


def test_names_follow_prometheus_rules(server: Running) -> None:
    text = server.http.get("/metrics").text
    for family in text_string_to_metric_families(text):
        assert re.fullmatch(r"(mxn|process)_[a-z_]+", family.name)
        assert family.documentation
        if family.type != "counter":
            assert not family.name.endswith("_total")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(server: Running) -> None:
    text = server.http.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_energy_is_told_when_asked_and_counted_with_its_source(server: Running) -> None:
    labels = "model=hash-model"
    before = samples(server)
    body = {"model": "hash-model", "prompt": "abcd", "max_tokens": 400, "ignore_eos": True, "include_energy": True}
    answers = [server.post("/v1/completions", body).json() for _ in range(6)]
    energy = answers[-1]["usage"]["mxn"]
    assert energy["source"] == "scripted (simulated)"
    assert 0 < energy["energy_j"] < 20 * FAKE_W
    assert "mxn" not in server.post("/v1/completions", {**body, "include_energy": False}).json()["usage"]
    after = samples(server)

    def charged(found: dict[tuple[str, str], float], use: str) -> float:
        series = f"chip=fake-hash-model,{labels},provenance=simulated,replica=hash-model/0,source=scripted,use={use}"
        return found.get(("mxn_chip_energy_joules_total", series), 0.0)

    asked_j = sum(answer["usage"]["mxn"]["energy_j"] or 0.0 for answer in answers)
    assert charged(after, "requests") - charged(before, "requests") >= 0.8 * asked_j
    assert charged(after, "idle") >= 0
    count = after["mxn_request_energy_joules_count", labels] - before["mxn_request_energy_joules_count", labels]
    assert count >= sum(answer["usage"]["mxn"]["energy_j"] is not None for answer in answers)


@pytest.mark.parametrize("streams", [False, True])
def test_request_that_a_stop_string_ends_knows_its_joules(server: Running, *, streams: bool) -> None:
    labels = "model=hash-model"
    body = {"model": "hash-model", "prompt": "abcd", "max_tokens": 400, "ignore_eos": True, "include_energy": True}
    text = server.post("/v1/completions", {**body, "seed": 1, "temperature": 0}).json()["choices"][0]["text"]
    before = samples(server)
    body |= {"stop": text[200:204], "temperature": 0}
    if streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        usage = events_of(server.post("/v1/completions", body))[-1]["usage"]
    else:
        usage = server.post("/v1/completions", body).json()["usage"]
    assert 0 < usage["completion_tokens"] < 400
    assert 0 < usage["mxn"]["energy_j"] < 20 * FAKE_W
    name = "mxn_request_energy_joules_count"
    assert samples(server)[name, labels] == before[name, labels] + 1
