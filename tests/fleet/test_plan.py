"""Plans of the example files: their text is checked in, and what they promise is counted again from the YAML alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mxn.config.chip_card import load_chip_cards
from mxn.config.deployments import load_deployments
from mxn.errors import ConfigError
from mxn.fleet.plan import Plan, make_plan
from mxn.fleet.plan_text import plan_lines

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted(path for path in (ROOT / "configs/examples").glob("*.yaml") if "nodes:" in path.read_text())
"""Those that describe their chips; the plan of the others depends on the machine."""
EXPECTED = Path(__file__).parent / "expected"
COMPLETE = {"single-cpu": True, "mixed": True, "power-capped": True, "overload": False, "infeasible": False}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {path.stem: make_plan(load_deployments(path)) for path in EXAMPLES}


def test_every_example_has_an_expected_plan() -> None:
    assert sorted(COMPLETE) == [path.stem for path in EXAMPLES] == sorted(p.stem for p in EXPECTED.glob("*.txt"))


@pytest.mark.parametrize("name", COMPLETE)
def test_the_plan_of_an_example_is_the_one_checked_in(plans: dict[str, Plan], name: str) -> None:
    """To renew: mxn plan configs/examples/NAME.yaml --explain > tests/fleet/expected/NAME.txt"""
    assert "\n".join(plan_lines(plans[name], explain=True)) + "\n" == (EXPECTED / f"{name}.txt").read_text()
    assert plans[name].is_complete is COMPLETE[name]


@pytest.mark.parametrize("name", COMPLETE)
def test_a_plan_keeps_within_chips_memory_power_limits_and_places(plans: dict[str, Plan], name: str) -> None:
    text = yaml.safe_load((ROOT / f"configs/examples/{name}.yaml").read_text())
    cluster, plan = text["cluster"], plans[name]
    nodes = {node["name"]: node for node in cluster["nodes"]}
    asked = {d.get("name", d["model"]): d for d in text["deployments"]}
    chips: dict[tuple[str, str], float] = {}
    rack_watts: dict[str, float] = {}
    for deployment in plan.deployments:
        wanted = asked[deployment.name]
        where, slo = wanted.get("where", {}), wanted.get("slo", {})
        capacity = 0.0
        for placed in deployment.placements:
            node = nodes[placed.pool.split("/")[0]]
            key = (node["name"], placed.kind)
            chips[key] = chips.get(key, 0.0) + placed.replicas * placed.chips_per_replica
            rack_watts[node.get("rack", "")] = rack_watts.get(node.get("rack", ""), 0.0) + placed.replicas * (
                placed.watts or 0.0
            )
            capacity += placed.replicas * placed.requests_per_s
            assert placed.memory_gib <= placed.memory_available_gib
            assert placed.chips_per_replica <= node["chips"][placed.kind]
            assert placed.ttft_ms <= slo.get("ttft_ms", 1e9) * 1.0001
            assert placed.tpot_ms <= slo.get("tpot_ms", 1e9) * 1.0001
            assert placed.kind not in where.get("not_chips", [])
            assert node.get("rack") in where.get("racks", [node.get("rack")])
            assert placed.quantisation in wanted.get("quantisations", [wanted.get("quantisation")])
        rate = wanted["load"]["requests_per_s"]
        assert min(1.0, capacity / rate) == pytest.approx(1 - deployment.unserved, abs=1e-5)
        replicas = sum(placed.replicas for placed in deployment.placements)
        bounds = wanted.get("replicas", {})
        assert bounds.get("min", 0) - deployment.missing_replicas <= replicas <= bounds.get("max", 10**9)
        if where.get("survives_domain_loss"):
            for lost in {placed.pool for placed in deployment.placements}:
                rack = nodes[lost.split("/")[0]]["rack"]
                rest = [p for p in deployment.placements if nodes[p.pool.split("/")[0]]["rack"] != rack]
                assert sum(p.replicas * p.requests_per_s for p in rest) >= rate * (1 - 1e-6)
    for (node_name, kind), used in chips.items():
        assert used <= nodes[node_name]["chips"][kind] * nodes[node_name].get("count", 1) + 1e-9
    for rack in cluster.get("racks", []):
        assert rack_watts.get(rack["name"], 0.0) <= rack["power_w"] * (1 + 1e-9)
    assert sum(rack_watts.values()) <= cluster.get("power_w", 1e12) * (1 + 1e-9)
    for stage in plan.stages:
        assert stage.value >= stage.bound * (1 - 1e-6) - 1e-6


def test_a_higher_tier_is_whole_before_a_lower_one_gets_what_it_could_use(plans: dict[str, Plan]) -> None:
    unserved = {d.tier: d.unserved for d in plans["overload"].deployments}
    assert unserved[0] == 0
    assert unserved[2] > 0


def test_what_would_help_is_named_and_does_help(tmp_path: Path, plans: dict[str, Plan]) -> None:
    (batch,) = [d for d in plans["overload"].deployments if d.unserved]
    assert batch.relaxations[0].startswith("+2 l40s")
    more = make_plan(load_deployments(ROOT / "configs/examples/overload.yaml"), what_if="+2 l40s")
    assert more.is_complete
    (instant,) = [d for d in plans["infeasible"].deployments if d.unserved]
    limit = instant.relaxations[0]
    assert limit.startswith("tpot_ms ")
    text = (
        (ROOT / "configs/examples/infeasible.yaml")
        .read_text()
        .replace("tpot_ms: 10", limit.split(" on ")[0].replace(" ", ": "))
    )
    path = tmp_path / "mxn.yaml"
    path.write_text(text.replace("ttft_ms: 100", "ttft_ms: 5000"))
    looser = make_plan(load_deployments(path))
    assert [p.kind for p in looser.deployments[1].placements] == ["l40s"]


def _plan(tmp_path: Path, cluster: str, deployment: str = "", *, what_if: str = "") -> Plan:
    path = tmp_path / "mxn.yaml"
    load = "load: {requests_per_s: 1, prompt_tokens: 100, output_tokens: 50}"
    model = "model: llama-3.1-8b-instruct, context_length: 8192"
    path.write_text(f"cluster: {cluster}\ndeployments:\n  - {{{model}, {load}{deployment}}}\n")
    return make_plan(load_deployments(path), what_if=what_if)


@pytest.mark.parametrize(
    ("cluster", "deployment", "part"),
    [
        ("{nodes: [{name: n, chips: {h200: 1}}]}", "", 'no chip card is called "h200"'),
        ("{nodes: [{name: n, chips: {epyc-9654: 1}}]}", "", "set host_memory_gib"),
        ("{nodes: [{name: n, chips: {tpu-v6e: 1}}], power_w: 500}", "", "power budget covers tpu-v6e"),
        ("{nodes: [{name: n, chips: {l4: 8}}], power_w: 10, unused_chips: idle}", "", "without any load"),
        (
            "{nodes: [{name: n, chips: {l4: 1}}]}",
            ", name: x, quantisation: bf16, where: {racks: [r]}",
            "name of a rack",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_with_its_reason(
    tmp_path: Path, cluster: str, deployment: str, part: str
) -> None:
    with pytest.raises(ConfigError, match=part.replace("(", r"\(")):
        _plan(tmp_path, cluster, deployment)


def test_requests_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mxn.yaml"
    load = "{requests_per_s: 1, prompt_tokens: 9000, output_tokens: 50}"
    path.write_text(
        "cluster: {nodes: [{name: n, chips: {h100-sxm: 1}}]}\n"
        f"deployments: [{{model: llama-3.1-8b-instruct, context_length: 8192, load: {load}}}]\n"
    )
    with pytest.raises(ConfigError, match="requests of 9050 tokens, its context holds 8192"):
        make_plan(load_deployments(path))


def test_a_chip_without_bandwidth_is_refused_by_name_and_the_plan_goes_on(tmp_path: Path) -> None:
    assert load_chip_cards()["hygon-k100"].memory_bandwidth_gb_s is None
    engine = "{name: own, chips: [hygon-k100], quantisations: [bf16]}"
    plan = _plan(tmp_path, f"{{nodes: [{{name: n, chips: {{hygon-k100: 1}}}}], backends: [{engine}]}}")
    assert plan.deployments[0].unserved == 1
    assert any("no memory bandwidth" in no.reason for no in plan.deployments[0].rejections)
    assert plan.deployments[0].relaxations


def test_a_chip_here_that_no_card_knows_is_said_to_need_one(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "{nodes: [{name: n}]}")
    if plan.is_complete:
        pytest.skip("a card knows the chips of this host")
    assert any("add one under cluster.chips" in text for text in plan.deployments[0].relaxations)


def test_chips_bought_and_given_away_change_the_plan(tmp_path: Path) -> None:
    cluster = "{nodes: [{name: n, chips: {l4: 2}}]}"
    assert _plan(tmp_path, cluster).chips_there == {"l4": 2}
    assert _plan(tmp_path, cluster, what_if="+9 h100-sxm,-1 l4").chips_there == {"l4": 1, "h100-sxm": 9}
    for wrong, part in (
        ("+2 h900", "no chip card"),
        ("-3 l4", "there are 2"),
        ("two l4", 'got "two l4"'),
        ("+0 l4", "got"),
    ):
        with pytest.raises(ConfigError, match=part):
            _plan(tmp_path, cluster, what_if=wrong)


def test_ten_thousand_deployments_of_one_model_are_planned(tmp_path: Path) -> None:
    path = tmp_path / "mxn.yaml"
    path.write_text(
        "cluster: {nodes: [{name: n, count: 400, chips: {l4: 8}}]}\ndeployments:\n"
        "  - {model: qwen3-0.6b, context_length: 2048, quantisation: bf16, "
        "load: {requests_per_s: 0.01, prompt_tokens: 50, output_tokens: 10}}\n"
    )
    file = load_deployments(path)
    many = tuple(file.deployments[0].model_copy(update={"name": f"d{i}"}) for i in range(10_000))
    plan = make_plan(file.model_copy(update={"deployments": many}))
    assert plan.is_complete
    assert plan.chips_used["l4"] == 2500


@pytest.mark.parametrize("name", ["mixed", "overload", "infeasible"])
def test_the_order_of_nodes_and_deployments_changes_nothing(plans: dict[str, Plan], name: str) -> None:
    file = load_deployments(ROOT / f"configs/examples/{name}.yaml")
    cluster = file.cluster.model_copy(update={"nodes": file.cluster.nodes[::-1]})
    turned = make_plan(file.model_copy(update={"cluster": cluster, "deployments": file.deployments[::-1]}))
    plan = plans[name]
    assert turned.stages[-1].value == pytest.approx(plan.stages[-1].value, rel=1e-4)
    assert {d.name: d.unserved for d in turned.deployments} == pytest.approx(
        {d.name: d.unserved for d in plan.deployments}, abs=2e-3
    )
    assert [stage.name for stage in turned.stages] == [stage.name for stage in plan.stages]


def _priced(tmp_path: Path, limit: float, *, chips: str = "{h100-sxm: 2, mi300x: 2}") -> Plan:
    path = tmp_path / "mxn.yaml"
    path.write_text(
        f"cluster: {{nodes: [{{name: n, chips: {chips}, host_memory_gib: 256}}]}}\n"
        f"policy: {{objective: watts, limits: {{usd_per_hour: {limit}}}}}\n"
        "deployments: [{model: llama-3.1-8b-instruct, context_length: 8192, "
        "load: {requests_per_s: 3, prompt_tokens: 1000, output_tokens: 200}}]\n"
    )
    return make_plan(load_deployments(path))


def test_a_limit_on_cost_is_kept_or_refused_with_the_least_that_would_do(tmp_path: Path) -> None:
    free = _priced(tmp_path, 1e6)
    assert free.usd_per_hour is not None
    assert free.notes == ()
    with pytest.raises(ConfigError, match=r"usd_per_hour is 0\.01; the cheapest plan .* costs"):
        _priced(tmp_path, 0.01)
    tight = _priced(tmp_path, free.usd_per_hour)
    assert tight.usd_per_hour == pytest.approx(free.usd_per_hour)


def test_a_limit_on_cost_that_nobody_can_check_fails_the_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"usd_per_hour cannot be checked: the cards of epyc-9654 have no price"):
        _priced(tmp_path, 100.0, chips="{epyc-9654: 2}")


def test_where_only_watts_are_short_watts_are_what_would_help(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "{power_w: 20, nodes: [{name: n, chips: {h100-sxm: 2}}]}")
    assert plan.deployments[0].unserved == 1
    assert all(text.startswith("+") and " W for site" in text for text in plan.deployments[0].relaxations)
    assert plan.deployments[0].relaxations
