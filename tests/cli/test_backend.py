"""`mxn backend` and what other commands do when a plugin is broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mxn.core.model import LoadSettings, Model
from mxn.errors import BackendError
from mxn.fleet.choice import choose

from .conftest import Mxn

DIES = """
from mxn.backends.fake import FakeBackend
class Acme(FakeBackend):
    name = "NAME"
    def probe(self):
        import os
        os._exit(9)
"""


def test_new_writes_a_package_and_says_what_comes_next(mxn: Mxn, tmp_path: Path) -> None:
    ran = mxn("backend", "new", "zeta", "--folder", str(tmp_path / "mxn-zeta"))
    assert ran.code == 0
    assert (tmp_path / "mxn-zeta/pyproject.toml").is_file()
    assert "mxn backend conform zeta --level 0" in ran.out
    assert mxn("backend", "new", "zeta", "--folder", str(tmp_path / "mxn-zeta")).code == 2


def test_doctor_shows_what_a_backend_says_of_itself(mxn: Mxn) -> None:
    ran = mxn("backend", "doctor", "fake")
    assert ran.code == 0
    assert "fake-0: Simulated chip" in ran.out
    assert "is_scripted" in ran.out


@pytest.mark.parametrize("command", ["doctor", "conform", "certify"])
def test_a_backend_that_is_not_there_is_named_with_those_that_are(mxn: Mxn, command: str) -> None:
    ran = mxn("backend", command, "nowhere")
    assert ran.code == 1
    assert 'backend "nowhere" is not installed; available: cpu, ' in ran.err


def test_conform_prints_the_level_and_writes_the_result(mxn: Mxn, tmp_path: Path) -> None:
    ran = mxn("backend", "conform", "fake", "--level", "0", "--out", str(tmp_path / "result.json"))
    assert ran.code == 0
    assert "reached L0 contract (6 pass)" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 100
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["level"] == 0
    assert found["subject"]["backend"] == "fake"


def test_a_broken_plugin_is_shown_by_chips_and_doctor_and_fails_conform(
    mxn: Mxn, install_plugins: Callable[[Mapping[str, str]], Path]
) -> None:
    path = {"PYTHONPATH": str(install_plugins({"dies": DIES}))}
    listed = mxn("chips", **path)
    assert listed.code == 0
    assert "dies" in listed.out
    assert "it ended the process that asked it (exit code 9)" in listed.out
    assert "cpu" in listed.out
    checked = mxn("doctor", "--quick", **path)
    assert checked.code == 1
    assert "mxn backend doctor dies says more" in checked.out
    assert mxn("backend", "doctor", "dies", **path).code == 1
    assert mxn("backend", "conform", "dies", "--level", "1", **path).code == 1


def test_serving_through_a_plugin_that_dies_is_refused_not_died_of(
    install_plugins: Callable[[Mapping[str, str]], Path], fake_model: Model
) -> None:
    install_plugins({"dies": DIES})
    with pytest.raises(BackendError, match="dies is broken: it ended the process that asked it"):
        choose("dies", fake_model.spec, LoadSettings())
