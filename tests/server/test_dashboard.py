"""The Grafana dashboard asks for metrics and labels that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Running

DASHBOARD = json.loads((Path(__file__).parents[2] / "configs/grafana/mxn.json").read_text())
METRIC = re.compile(r"\b(?:mxn|process)_[a-z0-9_]+\b")
FUNCTIONS = {"sum", "rate", "increase", "histogram_quantile"}


def queries() -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target


@pytest.fixture(scope="module")
def labels_of(server: Running) -> dict[str, set[str]]:
    """The labels of every metric that a server tells once it has answered."""
    server.post("/v1/completions", {"model": "fake-model", "prompt": "abcd", "max_tokens": 5})
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize(
    ("title", "target"), list(queries()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_panel_asks_for_what_there_is(title: str, target: dict[str, Any], labels_of: dict[str, set[str]]) -> None:
    expression = target["expr"]
    metrics = set(METRIC.findall(expression))
    assert metrics
    assert metrics <= labels_of.keys(), f"{title} asks for {metrics - labels_of.keys()}"
    labels = set().union(*(labels_of[metric] for metric in metrics))
    for group in re.findall(r"\b(?:by|on) \(?([a-z, ]+)\)", expression):
        assert set(group.split(", ")) <= labels
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    assert set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|=)", expression)) <= labels
    assert set(re.findall(r"([a-z_]+) ?\(", expression)) - {"by", "on"} <= FUNCTIONS


def test_every_quantity_has_a_unit_and_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
