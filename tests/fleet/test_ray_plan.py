"""What a Ray cluster is asked to run for a file and the nodes it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mxn.config.deployments import DeploymentsFile
from mxn.core.model import Model
from mxn.fleet.launchers.ray.group import ReplicaGroup
from mxn.fleet.ray_inventory import NODE_LABEL, RACK_LABEL, NodeReport
from mxn.fleet.ray_plan import groups_of

from .test_ray_inventory import fake, h100, report

Plan = Callable[..., tuple[list[ReplicaGroup], dict[str, str]]]


@pytest.fixture
def plan(fake_model: Model) -> Plan:
    """Groups for deployments, given as in a file, on nodes with two kinds of simulated chips."""

    def make(*deployments: dict[str, Any], nodes: list[NodeReport] | None = None, **parts: Any) -> Any:
        there = [report((fake(0, "sim-a"),), {"sim-a": 1}), report((fake(0, "sim-b"),), {"sim-b": 1})]
        file = DeploymentsFile.model_validate({"deployments": deployments, **parts}, strict=False)
        return groups_of(file, there if nodes is None else nodes, lambda name: fake_model)

    return make


def test_a_deployment_without_a_load_gets_its_fewest_replicas_on_chips_that_it_may_use(plan: Plan) -> None:
    [first, second], shortfalls = plan(
        {"model": "m", "backend": "fake"},
        {
            "name": "other",
            "model": "m",
            "backend": "fake",
            "where": {"chips": ["sim-b"]},
            "replicas": {"min": 2, "max": 5},
        },
    )
    assert (first.app, first.replicas, first.min_replicas, first.max_replicas) == ("mxn.m.fake.sim-a", 1, 1, 1)
    assert (second.app, second.replicas, second.min_replicas, second.max_replicas) == ("mxn.other.fake.sim-b", 2, 2, 5)
    assert shortfalls == {}


def test_a_deployment_that_nothing_can_run_is_told_of_and_the_others_run(plan: Plan) -> None:
    groups, shortfalls = plan(
        {"model": "m", "backend": "fake"},
        {"name": "gone", "model": "m", "backend": "cuda"},
        {"name": "barred", "model": "m", "backend": "fake", "where": {"not_chips": ["sim-a", "sim-b"]}},
    )
    assert [group.deployment for group in groups] == ["m"]
    assert "sim-a: cuda is not there, only fake" in shortfalls["gone"]
    assert "sim-b: `where` leaves this kind out" in shortfalls["barred"]


def test_deployments_take_the_emptiest_kind_and_share_chips_evenly_where_these_are_too_few(plan: Plan) -> None:
    same = {"model": "m", "backend": "fake"}
    groups, _ = plan(*({"name": name, **same} for name in "abc"), {"name": "d", **same, "chip_share": 0.25})
    assert [(group.kind, group.chips) for group in groups] == [
        ("sim-a", 0.5),
        ("sim-b", 0.5),
        ("sim-a", 0.5),
        ("sim-b", 0.25),
    ]


def test_simulated_chips_are_used_by_nobody_who_does_not_ask_for_them(plan: Plan) -> None:
    groups, shortfalls = plan({"model": "m"})
    assert groups == []
    assert set(shortfalls) == {"m"}


def test_places_become_conditions_on_labels_and_backends_get_their_environment(plan: Plan) -> None:
    [group], _ = plan(
        {"model": "m", "backend": "fake", "where": {"nodes": ["n1", "n2"], "racks": ["r1"]}},
        cluster={"ray": {"environments": {"fake": {"pip": ["acme==1"], "variables": {"A": "b"}}}}},
    )
    assert group.selector == {NODE_LABEL: "in(n1,n2)", RACK_LABEL: "in(r1)"}
    assert group.runtime_env == {"pip": ["acme==1"], "env_vars": {"A": "b"}}


def test_a_load_is_planned_for_and_the_largest_group_has_the_room_to_grow(plan: Plan) -> None:
    load = {"requests_per_s": 10, "prompt_tokens": 512, "output_tokens": 128}
    nodes = [report((h100(0), h100(1)), {"h100-sxm": 2})]
    groups, shortfalls = plan(
        {
            "name": "chat",
            "model": "llama-3.1-8b-instruct",
            "load": load,
            "replicas": {"min": 1, "max": 2},
            "slo": {"ttft_ms": 2000, "tpot_ms": 50},
        },
        nodes=nodes,
    )
    [group] = groups
    assert shortfalls == {}
    assert (group.backend, group.kind, group.max_replicas, group.min_replicas) == ("cuda", "h100-sxm", 2, 1)
    assert group.batch > 1
    assert group.settings.quantisation in ("bf16", "fp8", "int8", "int4")
    assert (group.ttft_s, group.tpot_s) == (2.0, 0.05)
