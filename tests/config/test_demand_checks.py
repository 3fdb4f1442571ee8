from __future__ import annotations

from pathlib import Path

import pytest

from mxn.config.deployments import load_deployments
from mxn.errors import ConfigError

_LOAD = "{requests_per_s: 1, prompt_tokens: 10, output_tokens: 10}"


def _faults(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mxn.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_deployments(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (
            "load: {requests_per_s: 0, prompt_tokens: 1, output_tokens: 1}",
            "requests_per_s: expected a number above 0, got 0",
        ),
        ("load: {requests_per_s: -1, prompt_tokens: 1, output_tokens: 1}", "got -1"),
        ("load: {requests_per_s: .nan, prompt_tokens: 1, output_tokens: 1}", "a finite number"),
        ("load: {requests_per_s: 1}", "expected prompt_tokens and output_tokens, or lengths"),
        (
            "load: {requests_per_s: 1, lengths: [{share: 0.5, prompt_tokens: 1, output_tokens: 1}]}",
            "shares of lengths that make 1",
        ),
        ("replicas: {min: 3, max: 2}", "min 3 not above max 2"),
        ("where: {racks: [r2]}", 'expected the name of a rack, got "r2"'),
        ("where: {nodes: [n2]}", 'expected the name of a node, got "n2"'),
        ("where: {apart_from: [mm]}", 'expected the name of a deployment, got "mm"'),
        ("where: {chips: [l4], not_chips: [l4]}", "all of them excluded"),
        ("wher: {}", 'did you mean "where"?'),
    ],
)
def test_what_cannot_be_planned_is_named_with_its_line(tmp_path: Path, line: str, part: str) -> None:
    text = f"cluster:\n  nodes: [{{name: n1, chips: {{l4: 1}}}}]\ndeployments:\n  - model: m\n    {line}\n"
    fault = _faults(tmp_path, text)
    assert part in fault
    assert "mxn.yaml:5:" in fault


def test_demands_that_must_be_together_through_others_cannot_be_apart(tmp_path: Path) -> None:
    rows = [
        f"  - {{model: {name}, load: {_LOAD}, where: {{{rule}}}}}"
        for name, rule in (
            ("a", "together_with: [b]"),
            ("b", "together_with: [c]"),
            ("c", "together_with: [a], apart_from: [a]"),
        )
    ]
    fault = _faults(tmp_path, "deployments:\n" + "\n".join(rows))
    assert fault.count("\n") == 0
    assert 'got "a", which together_with ties to "c"' in fault


def test_a_circle_of_together_with_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "mxn.yaml"
    path.write_text(
        "deployments:\n  - {model: a, where: {together_with: [b]}}\n  - {model: b, where: {together_with: [a]}}\n"
    )
    assert len(load_deployments(path).deployments) == 2


def test_a_node_in_a_rack_that_is_not_there_is_named(tmp_path: Path) -> None:
    fault = _faults(tmp_path, "cluster: {nodes: [{name: n, chips: {l4: 1}, rack: x}]}\ndeployments: [{model: a}]")
    assert 'cluster.nodes[0].rack: expected the name of a rack, got "x"' in fault


def test_nodes_of_a_ray_cluster_are_not_known_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mxn.yaml"
    path.write_text("cluster: {launcher: ray}\ndeployments:\n- {model: m, where: {nodes: [gpu-7], racks: [a]}}\n")
    assert load_deployments(path).deployments[0].where.nodes == ("gpu-7",)
