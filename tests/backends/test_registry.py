"""Backends are found by entry point, and a plugin that cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mxn.backends.registry import installed_backends, load_backend
from mxn.errors import BackendError

PLUGINS = {
    "raises": "raise ImportError('libacme.so is missing')",
    "alien": "class Acme: api_version = 1",
    "old": "from mxn.backends.fake import FakeBackend\nclass Acme(FakeBackend):\n    api_version = 0",
    "partial": "from mxn.backends.base import Backend\nclass Acme(Backend):\n    name = 'partial'",
    "good": "from mxn.backends.fake import FakeBackend\nclass Acme(FakeBackend):\n    name = 'good'",
    "misnamed": "from mxn.backends.fake import FakeBackend\nclass Acme(FakeBackend):\n    name = 'other'",
    "cpu": "from mxn.backends.fake import FakeBackend\nclass Acme(FakeBackend):\n    name = 'cpu'",
}


@pytest.fixture(autouse=True)
def plugins(install_plugins: Callable[[Mapping[str, str]], Path]) -> None:
    install_plugins(PLUGINS)


def test_built_in_backends_are_always_there_and_cannot_be_replaced() -> None:
    found = installed_backends()
    assert found["cpu"].target == "mxn.backends.cpu:CpuBackend"
    assert found["good"].distribution == "acme-chips"


def test_a_plugin_is_loaded_by_name() -> None:
    assert load_backend("good").probe().state == "active"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "libacme.so is missing"),
        ("alien", "expected a subclass"),
        ("old", "speaks adapter version 0; this mxn speaks 1; upgrade the backend's package"),
        ("misnamed", 'is registered as "misnamed" and calls itself "other"'),
        ("partial", "probe, chips, capabilities, supports, estimate, power are missing"),
        ("nowhere", "not installed; available: alien, cpu, "),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        load_backend(name)
