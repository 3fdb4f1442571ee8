"""The kit on backends that are right: mxn's own, a vendor's from its own distribution, and a new one."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mxn.backends.survey import survey
from mxn.conformance.run import conform
from mxn.conformance.scaffold import write_scaffold
from mxn.errors import ConfigError
from mxn.fleet.calibration.profile import read_profiles

ACME = Path(__file__).parents[2] / "examples/mxn-acme"
SCRIPTED = [
    "tokens and logprobs are the references",
    "the quantisation it chooses itself is close to the reference",
    "log probabilities of the prompt are the references",
]


def install(package: Path, into: Path) -> None:
    """Installs a distribution from its source into a folder, without the network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", into, package], check=True, timeout=120)


def run_mxn(*args: str, path: Path, cwd: Path) -> dict[str, Any]:
    """What a command that passes prints as JSON, run as a vendor would."""
    done = subprocess.run(
        [sys.executable, "-m", "mxn.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=cwd,
        env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "HOME": str(cwd), "TMPDIR": str(cwd)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fake", "cpu", "onnx"])
def test_own_backends_reach_level_3(name: str) -> None:
    state = survey([name])[name].probe
    if state.state == "absent":
        pytest.skip(f"{name} is absent: {state.reason}")
    certificate = conform(name)
    failed = {check.name: check.detail for check in certificate.checks if check.status not in ("pass", "n/a")}
    assert not failed
    assert certificate.level == 3
    not_judged = [check.name for check in certificate.checks if check.status == "n/a"]
    assert not_judged == (SCRIPTED if name == "fake" else []), "fake has no numerics, and says so"


@pytest.mark.slow
def test_the_toy_vendor_reaches_level_3_from_its_own_distribution(tmp_path: Path) -> None:
    install(ACME, tmp_path / "site")
    found = run_mxn("backend", "conform", "acme", "--json", path=tmp_path / "site", cwd=tmp_path)
    assert found["level"] == 3
    assert {check["status"] for check in found["checks"]} == {"pass"}
    assert found["subject"]["distribution"] == "mxn-acme"
    assert found["subject"]["version"] == "1.0.0"
    assert len(found["subject"]["sha256"]) == len(found["kit"]["sha256"]) == 64
    assert set(found["models"]) == {"tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"}


def test_the_toy_vendor_is_at_most_150_lines() -> None:
    """Lines of code: neither blank nor comment nor docstring."""
    assert sum(lines_of_code(path.read_text()) for path in ACME.glob("mxn_acme/*.py")) <= 150


@pytest.mark.slow
def test_a_profile_is_measured_for_the_planner(tmp_path: Path) -> None:
    install(ACME, tmp_path / "site")
    found = run_mxn("backend", "conform", "acme", "--level", "4", "--json", path=tmp_path / "site", cwd=tmp_path)
    profile = found["profile"]
    assert found["level"] == 4
    assert {point["batch"] for point in profile["decode"]} == {1, 2, 8, 16}
    assert all(0 < point["min_s"] <= point["median_s"] <= point["max_s"] for point in profile["decode"])
    assert [point["tokens"] for point in profile["prefill"]][:2] == [16, 64]
    assert profile["power"]["idle_w"] == pytest.approx(2.0, abs=0.1)
    assert all(point["watts"] > profile["power"]["idle_w"] for point in profile["decode"])
    assert profile["memory_bytes"] == profile["weight_bytes"] + profile["kv_bytes"]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    assert read_profiles(path.read_text(), "profile")[0].model == profile["model"]


def test_a_scaffold_passes_level_0_from_its_own_distribution(tmp_path: Path) -> None:
    write_scaffold("zeta", tmp_path / "mxn-zeta")
    install(tmp_path / "mxn-zeta", tmp_path / "site")
    found = run_mxn("backend", "conform", "zeta", "--level", "0", "--json", path=tmp_path / "site", cwd=tmp_path)
    assert found["level"] == 0
    assert {check["status"] for check in found["checks"]} == {"pass"}


def test_a_scaffold_goes_no_further_and_says_why(
    install_plugins: Callable[[Mapping[str, str]], Path], tmp_path: Path
) -> None:
    _, module = write_scaffold("zeta", tmp_path / "mxn-zeta")
    install_plugins({"zeta": module.read_text().replace("ZetaBackend", "Acme")})
    certificate = conform("zeta", levels=[1])
    assert certificate.level == 0
    first = next(check for check in certificate.checks if check.level == 1)
    assert (first.status, "load is not written yet" in first.detail) == ("fail", True)
    assert {check.status for check in certificate.checks if check.level == 1} == {"fail", "not run"}


@pytest.mark.parametrize(
    ("name", "words"), [("Acme", "lower-case"), ("1x", "lower-case"), ("cpu", "installed already")]
)
def test_a_scaffold_wants_a_name_of_its_own(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        write_scaffold(name, tmp_path / "new")


def test_a_scaffold_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="not an empty folder"):
        write_scaffold("zeta", tmp_path)


def lines_of_code(source: str) -> int:
    numbers = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            numbers -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(numbers)
