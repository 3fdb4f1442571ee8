"""mxn.yaml: every fault at once, with its place; defaults; schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxn.config.deployments import DeploymentConfig, DeploymentsFile, deployments_schema, load_deployments
from mxn.errors import ConfigError

GOOD = """
server: {host: 127.0.0.1, port: 0}
deployments:
  - name: chat
    model: smollm2-135m-instruct
    quantisation: int8
    context_length: 2048
    kv_gib: 0.5
  - model: Qwen/Qwen3-0.6B
"""

BAD = """\
server:
  prot: 80
  host: ""
  port: 65536
  max_body_mib: .nan
deployments:
  - name: a
    model: x
    kv_gib: 1e308
    max_num_seqs: 1e308
    threads: ten
  - model: x
    prefix_cache: no
    context_lenght: 4
    quantisation: int3
  - name: a
  - model: q
    max_step_tokens: 0
  - model: q
  - 7
extra: 1
"""


def _load(folder: Path, text: str) -> DeploymentsFile:
    path = folder / "mxn.yaml"
    path.write_text(text, encoding="utf-8")
    return load_deployments(path)


def test_a_good_file_becomes_frozen_values(tmp_path: Path) -> None:
    file = _load(tmp_path, GOOD)
    first, second = file.deployments
    assert (file.server.port, first.name, second.name) == (0, "chat", None)
    loading = first.load_settings()
    assert (loading.quantisation, loading.context_length, loading.kv_bytes) == ("int8", 2048, 1 << 29)
    assert second.load_settings().kv_bytes is None
    with pytest.raises(ValueError, match="frozen"):
        first.model = "other"  # type: ignore[misc]


def test_all_faults_come_at_once_with_their_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, BAD)
    lines = [line.removeprefix(str(tmp_path / "mxn.yaml")) for line in str(error.value).splitlines()]
    assert lines == [
        ':2:3: server.prot: unknown key; did you mean "port"? '
        "(known here: host, port, api_keys, max_queue, max_body_mib, drain_s, vllm_metrics)",
        ":3:9: server.host: expected text of at least 1 characters, got ''",
        ":4:9: server.port: expected a number of at most 65535, got 65536",
        ":5:17: server.max_body_mib: expected a finite number, got .nan",
        ":9:13: deployments[0].kv_gib: expected a number of at most 1e+06 or 'auto', got 1e+308",
        ":10:19: deployments[0].max_num_seqs: expected a whole number, got 1e+308",
        ":11:14: deployments[0].threads: expected a whole number, got 'ten'",
        ":13:19: deployments[1].prefix_cache: expected true or false, got 'no'",
        ':14:5: deployments[1].context_lenght: unknown key; did you mean "context_length"? '
        f"(known here: {', '.join(DeploymentConfig.model_fields)})",
        ":15:19: deployments[1].quantisation: expected 'auto', 'fp32', 'bf16', 'fp16', 'fp8', 'int8' or 'int4', "
        "got 'int3'",
        ":16:5: deployments[2].model: expected a value, got nothing: the key is missing",
        ':16:11: deployments[2].name: expected a name of its own, got "a" like deployments[0]; set name',
        ":18:22: deployments[3].max_step_tokens: expected a number of at least 1, got 0",
        ':19:12: deployments[4].model: expected a name of its own, got "q" like deployments[3]; set name',
        ":20:5: deployments[5]: expected a mapping, got 7",
        ":21:1: extra: unknown key (known here: server, cluster, policy, deployments)",
    ]


def test_a_list_of_faulty_entries_is_not_called_too_short(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, "deployments: [{model: m, threads: ten}]")
    assert str(error.value).endswith("mxn.yaml:1:35: deployments[0].threads: expected a whole number, got 'ten'")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected a mapping, got nothing"),
        ("just words", "expected a mapping, got 'just words'"),
        ("server: {}", "deployments: expected a value, got nothing"),
        ("deployments: []", "deployments: expected at least 1 entries, got a list of 0"),
        ("deployments: {a: 1}", "deployments: expected a list, got a mapping"),
        ("deployments: [{model: ''}]", "expected text of at least 1 characters"),
        ("deployments: [{model: m, name: ../../etc}]", "deployments[0].name: expected text of the form"),
        ("deployments: [{model: m, max_num_seqs: true}]", "expected a whole number, got true"),
        ("deployments: [{model: m, max_num_seqs: 2147483648}]", "at most 65536"),
        ("deployments: [{model: m, max_num_seqs: -1}]", "at least 1"),
        ("deployments: [{model: m, kv_gib: 0}]", "a number above 0"),
        ("deployments: [{model: 5}]", "expected text, got 5"),
        ("server: {api_keys: [short]}\ndeployments: [{model: m}]", "server.api_keys[0]: expected text of at least 8"),
    ],
)
def test_a_fault_says_what_was_expected_and_what_was_got(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, text)
    assert part in str(error.value)


def test_the_schema_describes_every_field() -> None:
    schema = deployments_schema()
    assert json.loads(json.dumps(schema)) == schema
    fields = schema["$defs"]["DeploymentConfig"]["properties"]
    assert set(fields) == set(DeploymentConfig.model_fields)
    undescribed = [name for name, field in fields.items() if "description" not in field and "enum" not in str(field)]
    assert undescribed == []
    assert schema["additionalProperties"] is False
