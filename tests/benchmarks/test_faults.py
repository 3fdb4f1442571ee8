"""The harness that breaks fleets: what counts as a promise kept, and one scenario from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from fault_scenarios.load import Answer, Load  # noqa: E402
from fault_scenarios.report import Report, table  # noqa: E402


def test_promises_are_kept_at_their_limits_and_broken_beyond() -> None:
    report = Report()
    report.at_most("seconds", 5.0, 5)
    report.at_least("share", 0.95, 0.95)
    report.equal("lost", 0, 0)
    assert report.is_kept
    for value in (5.01, None, float("nan")):
        worse = Report()
        worse.at_most("seconds", value, 5)
        assert not worse.is_kept
    report.equal("lost", 1, 0)
    assert not report.is_kept


def test_table_has_a_line_for_every_promise_and_for_what_was_not_run() -> None:
    report, skipped = Report(), Report()
    report.at_most("seconds", 2.0, 5)
    report.equal("lost", 1, 0)
    skipped.skip("no such chip")
    rows = [
        {"scenario": "kill", "fault": "it breaks", **asdict(report)},
        {"scenario": "chip", "fault": "it goes", **asdict(skipped)},
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 5
    assert lines[2].endswith("| seconds: at most 5 | 2.0 | kept |")
    assert lines[3].endswith("| lost: 0 | 1 | **broken** |")
    assert "not run: no such chip" in lines[4]


def test_answers_are_counted_by_outcome_and_timed_when_they_are_right() -> None:
    load = Load("http://localhost/v1", "m")
    for begin_s, outcome in ((0.0, "ok"), (1.0, "ok"), (1.5, "reset"), (2.0, "different")):
        load.answers.append(
            Answer(prompt=0, is_streamed=True, begin_s=begin_s, end_s=begin_s + 1 + begin_s, outcome=outcome)
        )
    assert load.count("ok") == 2
    assert load.count("reset", "different") == 2
    assert load.latency_s(100) == 2.0
    assert load.latency_s(100, until_s=0.5) == 1.0


@pytest.mark.slow
def test_a_killed_replica_costs_no_request(model_folder: str, tmp_path: Path) -> None:
    record = tmp_path / "faults.json"
    command = [sys.executable, str(ROOT / "benchmarks/faults.py"), "kill", "--model", model_folder]
    done = subprocess.run(
        [*command, "--scale", "0.2", "--json", str(record)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads(record.read_text())["scenarios"]
    assert row["is_kept"]
    assert row["figures"]["requests"] > 16
