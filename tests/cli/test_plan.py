from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Mxn

EXAMPLES = Path(__file__).parent.parent.parent / "configs/examples"


@pytest.mark.parametrize(("name", "code"), [("mixed", 0), ("overload", 3), ("infeasible", 3)])
def test_the_exit_code_says_whether_everything_is_served(mxn: Mxn, name: str, code: int) -> None:
    ran = mxn("plan", str(EXAMPLES / f"{name}.yaml"))
    assert (ran.code, ran.err) == (code, "")
    assert ran.out.startswith("# uncalibrated")


def test_json_holds_the_whole_plan(mxn: Mxn) -> None:
    plan = json.loads(mxn("plan", str(EXAMPLES / "mixed.yaml"), "--json").out)
    assert [d["name"] for d in plan["deployments"]] == ["large", "chat", "small"]
    assert all(d["placements"] and d["rejections"] and d["runner_up"] for d in plan["deployments"])
    assert plan["stages"][-1]["bound"] <= plan["stages"][-1]["value"] * (1 + 1e-9)


def test_a_policy_may_take_an_incomplete_plan(mxn: Mxn, tmp_path: Path) -> None:
    text = (EXAMPLES / "overload.yaml").read_text()
    path = tmp_path / "mxn.yaml"
    path.write_text(text.replace("{objective: goodput}", "{objective: goodput, fallback: warn}"))
    ran = mxn("plan", str(path))
    assert ran.code == 0
    assert "not everything is served" in ran.err


def test_faults_of_the_file_and_of_what_if_are_one_error(mxn: Mxn, tmp_path: Path) -> None:
    path = tmp_path / "mxn.yaml"
    path.write_text("cluster: {nodes: []}\ndeployments: [{model: m, lod: 1}]\n")
    ran = mxn("plan", str(path))
    assert ran.code == 2
    assert 'did you mean "load"?' in ran.err
    wrong = mxn("plan", str(EXAMPLES / "mixed.yaml"), "--what-if", "-9 h100-sxm")
    assert wrong.code == 2
    assert "9 h100-sxm cannot be taken away, there are 2" in wrong.err


def test_fit_prints_parts_and_verdict(mxn: Mxn) -> None:
    ran = mxn("fit", "qwen3-32b", "--chip", "h100-sxm", "--quantisation", "fp8", "--json")
    (report,) = json.loads(ran.out)
    assert report["verdict"] == "fits"
    assert report["fit"]["weights"]["provenance"] == "estimated"
    assert mxn("fit", "qwen3-32b", "--chip", "nothing").code == 2


def test_a_plan_compared_with_itself_moves_nothing(mxn: Mxn, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(mxn("plan", str(EXAMPLES / "mixed.yaml"), "--json").out)
    ran = mxn("diff", str(EXAMPLES / "mixed.yaml"), str(path))
    assert ran.code == 0
    assert ran.out.endswith("nothing would move\n")
    grown = json.loads(mxn("diff", str(EXAMPLES / "mixed.yaml"), str(path), "--what-if=-1 mi300x", "--json").out)
    assert {move["action"] for move in grown} <= {"keep", "start", "stop"}


def test_the_schema_is_printed_for_editors(mxn: Mxn) -> None:
    schema = json.loads(mxn("config", "schema").out)
    assert {"cluster", "policy", "deployments"} <= set(schema["properties"])
