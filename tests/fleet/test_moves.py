from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mxn.config.deployments import DeploymentsFile, load_deployments
from mxn.errors import ConfigError
from mxn.fleet.moves import moves, read_running
from mxn.fleet.plan import make_plan

CHIPS = "{name: a, count: 2, chips: {h100-sxm: 2}}"
LOAD = "{requests_per_s: 9, prompt_tokens: 500, output_tokens: 200}"


def _file(tmp_path: Path, nodes: str = CHIPS, load: str = LOAD, policy: str = "{}") -> DeploymentsFile:
    path = tmp_path / "mxn.yaml"
    path.write_text(
        f"cluster: {{nodes: [{nodes}]}}\npolicy: {policy}\ndeployments:\n"
        f"  - {{model: llama-3.1-8b-instruct, context_length: 8192, quantisations: [bf16, fp8], load: {load}}}\n"
    )
    return load_deployments(path)


def _save(tmp_path: Path, file: DeploymentsFile) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(asdict(make_plan(file))))
    return path


def test_the_same_file_moves_nothing(tmp_path: Path) -> None:
    file = _file(tmp_path)
    running = read_running(_save(tmp_path, file))
    assert {move.action for move in moves(running, make_plan(file, running=running))} == {"keep"}


def test_a_better_chip_is_used_when_it_saves_more_than_moving_costs(tmp_path: Path) -> None:
    running = read_running(_save(tmp_path, _file(tmp_path)))
    more = f"{CHIPS}, {{name: b, count: 2, chips: {{h200-sxm: 2}}}}"
    eager = _file(tmp_path, more, policy="{stability: {min_gain: 0, loading_is_spread_over_s: 1.0e+8}}")
    found = list(moves(running, make_plan(eager, running=running)))
    assert [move.pool for move in found if move.action == "start"] == ["b/h200-sxm"]
    assert found[0].action == "start"  # before anything stops
    assert found[0].load_s
    reluctant = _file(tmp_path, more, policy="{stability: {min_gain: 5}}")
    assert {move.action for move in moves(running, make_plan(reluctant, running=running))} == {"keep"}


def test_what_lost_its_chips_starts_elsewhere_and_the_rest_stays(tmp_path: Path) -> None:
    heavy = "{requests_per_s: 45, prompt_tokens: 500, output_tokens: 200}"
    nodes = ["{name: a, chips: {h100-sxm: 2}}", "{name: b, chips: {h100-sxm: 2}}", "{name: c, chips: {l40s: 4}}"]
    running = read_running(_save(tmp_path, _file(tmp_path, ", ".join(nodes), heavy)))
    lost = min(option.split()[0] for option in running["llama-3.1-8b-instruct"])
    left = [node for node in nodes if not node.startswith(f"{{name: {lost[0]},")]
    assert len(left) == 2
    after = make_plan(_file(tmp_path, ", ".join(left), heavy), running=running)
    assert after.is_complete
    found = list(moves(running, after))
    assert all(move.pool == lost for move in found if move.action == "stop")
    assert any(move.action == "start" and move.pool != lost for move in found)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("", "[]", '{"deployments": [{"name": 1}]}', "\x00"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="mxn plan --json"):
            read_running(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_running(tmp_path / "none.json")
