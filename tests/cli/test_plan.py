from __future__ import annotations

import json
import re
from html.parser import HTMLParser
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


def test_the_page_holds_the_matrix_and_needs_nothing_else(mxn: Mxn, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert mxn("plan", str(EXAMPLES / "mixed.yaml"), "--html", str(page)).code == 0
    text = page.read_text()
    parser = _Cells()
    parser.feed(text)
    assert len(parser.rows) == 3
    assert all(len(cells) == 3 for cells in parser.rows)
    assert "needs up to" in parser.rows[0][0]  # the refusal stands where the figure would
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    assert mxn("plan", str(EXAMPLES / "mixed.yaml"), "--html", str(tmp_path / "no" / "plan.html")).code == 2


def test_names_in_a_page_are_text(mxn: Mxn, tmp_path: Path) -> None:
    path, page = tmp_path / "<b>.yaml", tmp_path / "plan.html"
    path.write_text((EXAMPLES / "single-cpu.yaml").read_text())
    assert mxn("plan", str(path), "--html", str(page)).code == 0
    assert "&lt;b&gt;" in page.read_text()
    assert "<b>.yaml" not in page.read_text()


class _Cells(HTMLParser):
    """The text of the cells of the first table, row by row, without those of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._depth = self._tables = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._tables += tag == "table"
        if self._tables != 1:
            return
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
            self._depth = 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._depth = 0
        if tag == "table" and self._tables == 1:
            self.rows = [row for row in self.rows if row]

    def handle_data(self, data: str) -> None:
        if self._depth and self._tables == 1:
            self.rows[-1][-1] += data
