"""Backends are found by entry point, and a broken plugin harms nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxn.backends.registry import installed_backends, load_backend, probe_all
from mxn.errors import BackendError

PLUGINS = {
    "raises": "raise ImportError('libacme.so is missing')",
    "alien": "class Acme: api_version = 1",
    "old": "from mxn.backends.fake import FakeBackend\nclass Acme(FakeBackend):\n    api_version = -3",
    "partial": "from mxn.backends.base import Backend\nclass Acme(Backend):\n    name = 'partial'",
    "good": "from mxn.backends.fake import FakeBackend\nclass Acme(FakeBackend):\n    name = 'good'",
}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution, really on the path, that brings one backend for each way a plugin can be."""
    info = tmp_path / "acme_chips-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-chips\nVersion: 1.0\n")
    lines = ["[mxn.backends]"]
    for name, source in PLUGINS.items():
        (tmp_path / f"acme_{name}.py").write_text(source + "\n")
        lines.append(f"{name} = acme_{name}:Acme")
    lines.append("cpu = acme_good:Acme")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_built_in_backends_are_always_there_and_cannot_be_replaced(plugins: None) -> None:
    found = installed_backends()
    assert found["cpu"].target == "mxn.backends.cpu:CpuBackend"
    assert found["good"].distribution == "acme-chips"


def test_a_plugin_is_loaded_by_name(plugins: None) -> None:
    assert load_backend("good").probe().state == "active"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "libacme.so is missing"),
        ("alien", "expected a subclass"),
        ("old", "adapter version -3"),
        ("partial", "abstract"),
        ("nowhere", "not installed; available: alien, cpu, fake"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_with_the_reason(plugins: None, name: str, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        load_backend(name)


def test_probing_reports_broken_plugins_and_goes_on(plugins: None) -> None:
    states = {name: probe.state for name, probe in probe_all().items()}
    assert {states[name] for name in ("raises", "alien", "old", "partial")} == {"broken"}
    assert states["good"] == states["fake"] == "active"
