"""From a file to replicas: chips chosen and divided, memory reckoned, misfits refused or told."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mxn.config.deployments import DeploymentConfig, DeploymentsFile, load_deployments
from mxn.core.model import Model
from mxn.errors import BackendError, ConfigError
from mxn.fleet.desired import Wishes
from mxn.fleet.spec import FleetSpec, PlacementSpec


@pytest.fixture
def llama(fake_model: Model) -> Model:
    """A model of 1 GiB in float32 that the cpu backend would load."""
    spec = replace(
        fake_model.spec,
        architecture="LlamaForCausalLM",
        num_layers=16,
        hidden_size=1024,
        num_heads=16,
        num_kv_heads=16,
        key_dim=64,
        value_dim=64,
        num_parameters=1 << 28,
    )
    return replace(fake_model, spec=spec)


def wishes_for(model: Model, *deployments: dict[str, Any], **policy: Any) -> Wishes:
    configs = tuple(DeploymentConfig.model_validate({"model": "m", "backend": "cpu"} | one) for one in deployments)
    file = DeploymentsFile.model_validate({"deployments": configs, "policy": policy})
    return Wishes(file=file, models={"m": model})


def placements(spec: FleetSpec) -> dict[str, PlacementSpec]:
    return {placement.id: placement for one in spec.deployments for placement in one.placements}


def test_a_model_alone_gets_a_whole_chip_and_settings_as_they_are(llama: Model) -> None:
    spec = wishes_for(llama, {"name": "one", "quantisation": "fp32"})()
    [placement] = placements(spec).values()
    assert (placement.backend, placement.chips[0].uid, placement.chip_share) == ("cpu", "cpu-0", 1.0)
    assert placement.settings.kv_bytes is None
    assert placement.memory_bytes > 4 << 28  # its weights at least
    assert placement.why == "as asked"


def test_models_that_share_a_chip_divide_its_memory_and_energy(llama: Model) -> None:
    spec = wishes_for(llama, {"name": "one"}, {"name": "two", "chip_share": 0.25})()
    found = placements(spec)
    assert found["one/0"].chip_share == 0.75
    assert found["two/0"].chip_share == 0.25
    assert all(placement.settings.kv_bytes for placement in found.values())
    assert sum(placement.memory_bytes for placement in found.values()) <= spec.memory_bytes["cpu-0"]
    assert found["two/0"].why == "as asked; 25% of cpu-0"


def test_models_on_demand_take_turns_in_what_is_left(llama: Model) -> None:
    cold = {"keep_loaded": False}
    spec = wishes_for(llama, {"name": "kept"}, {"name": "one"} | cold, {"name": "two"} | cold)()
    assert {p.chip_share for p in placements(spec).values()} == {0.5}
    assert [one.is_on_demand for one in spec.deployments] == [False, True, True]


def test_shares_beyond_the_chip_are_refused(llama: Model) -> None:
    wishes = wishes_for(llama, {"name": "one", "chip_share": 0.7}, {"name": "two", "chip_share": 0.6})
    with pytest.raises(ConfigError, match=r"cpu-0: the chip_share of one, two come to 1\.30"):
        wishes()


def test_what_does_not_fit_into_its_part_is_refused_or_told(llama: Model) -> None:
    large = replace(llama, spec=replace(llama.spec, num_parameters=1 << 40))
    two = ({"name": "one", "quantisation": "fp32"}, {"name": "two", "quantisation": "fp32"})
    with pytest.raises(ConfigError, match=r"one: it needs .* its part of 50% is .*: give it a larger chip_share"):
        wishes_for(large, *two)()
    spec = wishes_for(large, *two, fallback="allow")()
    assert not placements(spec)
    assert "larger chip_share" in spec.shortfalls["two"]


def test_a_file_may_ask_for_more_replicas_than_chips(llama: Model) -> None:
    spec = wishes_for(llama, {"name": "one", "replicas": {"min": 3}})()
    assert list(placements(spec)) == ["one/0", "one/1", "one/2"]


def test_a_chip_that_may_not_be_used_is_not(llama: Model) -> None:
    wishes = wishes_for(llama, {"name": "one"})
    with pytest.raises(BackendError, match="cpu on cpu-0 may not be used now"):
        wishes({"cpu-0"})
    tolerant = wishes_for(llama, {"name": "one"}, fallback="allow")
    assert "may not be used now" in tolerant({"cpu-0"}).shortfalls["one"]


def test_where_leaves_chips_out(llama: Model) -> None:
    with pytest.raises(BackendError, match="`where` leaves out every chip"):
        wishes_for(llama, {"name": "one", "where": {"not_chips": ("cpu-0",)}})()


def test_own_processes_count_as_free_memory(llama: Model) -> None:
    wishes = wishes_for(llama, {"name": "one"})
    without = wishes().memory_bytes["cpu-0"]
    wishes.pids = lambda: [os.getpid()] * 100
    assert wishes().memory_bytes["cpu-0"] > without + (2 << 30)


def test_a_file_for_other_machines_is_not_served_here(tmp_path: Path) -> None:
    path = tmp_path / "mxn.yaml"
    path.write_text(
        "cluster: {nodes: [{name: far, chips: {h100-sxm: 8}}]}\ndeployments: [{model: smollm2-135m-instruct}]\n"
    )
    with pytest.raises(ConfigError, match="far describe chips for a plan"):
        Wishes.fetched(load_deployments(path), lambda name: pytest.fail(f"{name} was fetched"))
