from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxn.config.deployments import deployments_schema, load_deployments
from mxn.errors import ConfigError


def _file(folder: Path, load: str, *, rows: list[tuple[float, int, int]]) -> Path:
    lines = [
        json.dumps({"timestamp": 1e3 * at_s, "input_length": prompt, "output_length": output})
        for at_s, prompt, output in rows
    ]
    (folder / "trace.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "mxn.yaml"
    path.write_text(f"deployments: [{{model: m, load: {load}}}]\n")
    return path


STEADY = [(float(second), 100 + second % 10, 20) for second in range(600)]


def test_the_rate_is_that_of_the_busiest_minute(tmp_path: Path) -> None:
    burst = [(300 + i / 10, 50, 5) for i in range(300)]  # 10 requests/s for half a minute
    load = load_deployments(_file(tmp_path, "{trace: trace.jsonl}", rows=sorted(STEADY + burst))).deployments[0].load
    assert load is not None
    assert load.requests_per_s == pytest.approx((300 + 61) / 60, rel=0.02)
    scaled = load_deployments(_file(tmp_path, "{trace: trace.jsonl, trace_scale: 3}", rows=STEADY)).deployments[0].load
    assert scaled is not None
    assert scaled.requests_per_s == pytest.approx(3 * 61 / 60)


def test_the_parts_have_the_tokens_of_the_trace(tmp_path: Path) -> None:
    rows = [(float(i), 10 if i % 20 else 5000, 1 + i % 100) for i in range(1000)]
    load = load_deployments(_file(tmp_path, "{trace: trace.jsonl}", rows=rows)).deployments[0].load
    assert load is not None
    assert sum(part.share for part in load.parts) == pytest.approx(1)
    mean = sum(part.share * part.prompt_tokens for part in load.parts)
    assert mean == pytest.approx(sum(prompt for _, prompt, _ in rows) / 1000, rel=0.01)
    mean = sum(part.share * part.output_tokens for part in load.parts)
    assert mean == pytest.approx(sum(output for *_, output in rows) / 1000, rel=0.02)
    assert max(part.prompt_tokens for part in load.parts) == 5000


def test_an_alias_of_a_load_is_read_once(tmp_path: Path) -> None:
    path = _file(tmp_path, "&one {trace: trace.jsonl}", rows=STEADY)
    path.write_text(path.read_text().replace("}]", "}, {model: n, load: *one}]"))
    first, second = load_deployments(path).deployments
    assert first.load == second.load


@pytest.mark.parametrize(
    ("load", "rows", "message"),
    [
        ("{trace: nowhere.csv}", STEADY, r"load\.trace: expected a trace .*nowhere\.csv cannot be read"),
        ("{trace: trace.jsonl, requests_per_s: 1}", STEADY, r"expected a trace or requests_per_s, got both"),
        ("{trace: trace.jsonl}", [(0.0, 1, 1)], "all its requests come at one moment"),
        ("{trace: trace.jsonl, trace_scale: 0}", STEADY, "trace_scale: expected a number above 0"),
        ("{trace: 7}", STEADY, "trace: expected text"),
        ("{}", STEADY, "requests_per_s: expected a value"),
    ],
)
def test_a_trace_that_gives_no_load_is_one_fault_at_its_place(
    tmp_path: Path, load: str, rows: list[tuple[float, int, int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_deployments(_file(tmp_path, load, rows=rows))
    assert "mxn.yaml:1:" in str(caught.value)


def test_the_schema_takes_a_load_that_is_only_a_trace() -> None:
    assert "required" not in deployments_schema()["$defs"]["LoadConfig"]
