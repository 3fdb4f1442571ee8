"""Folders and flags from environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxn.config import environment
from mxn.errors import ConfigError


def test_own_variables_come_before_xdg_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MXN_CACHE_DIR", raising=False)
    assert environment.cache_dir() == tmp_path / "xdg" / "mxn"
    monkeypatch.setenv("MXN_CACHE_DIR", str(tmp_path / "own"))
    assert environment.cache_dir() == tmp_path / "own"


def test_a_relative_xdg_folder_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.delenv("MXN_DATA_DIR", raising=False)
    assert environment.data_dir() == tmp_path / ".local/share/mxn"


def test_sockets_go_where_the_session_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MXN_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("MXN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert environment.runtime_dir() == tmp_path / "cache" / "run"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert environment.runtime_dir() == tmp_path / "mxn"
    monkeypatch.setenv("MXN_RUNTIME_DIR", str(tmp_path / "own"))
    assert environment.runtime_dir() == tmp_path / "own"


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_is_a_flag(monkeypatch: pytest.MonkeyPatch, text: str, expected: bool) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("MXN_OFFLINE", text)
    assert environment.is_offline() is expected


def test_a_flag_that_is_neither_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_OFFLINE", "maybe")
    with pytest.raises(ConfigError, match="MXN_OFFLINE is 'maybe'; expected 1 or 0"):
        environment.is_offline()


def test_api_keys_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_API_KEY", " one , two,, ")
    assert environment.api_keys() == ("one", "two")


def test_an_unknown_log_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_LOG_LEVEL", "chatty")
    with pytest.raises(ConfigError, match="expected one of debug, info, warning, error"):
        environment.log_level()


def test_a_child_gets_the_environment_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_TEST_VALUE", "a")
    child = environment.child_environment({"MXN_TEST_OTHER": "b"})
    assert (child["MXN_TEST_VALUE"], child["MXN_TEST_OTHER"]) == ("a", "b")


def test_defaults_reach_the_child_and_not_what_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    child = environment.child_environment(defaults={"GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"})
    assert (child["GOMP_SPINCOUNT"], child["OMP_NUM_THREADS"]) == ("0", "3")
    for name, value in child.items():
        monkeypatch.setenv(name, value)
    grandchild = environment.child_environment({"MXN_TEST_OTHER": "b"})
    assert "GOMP_SPINCOUNT" not in grandchild
    assert grandchild["OMP_NUM_THREADS"] == "3"


def test_the_shipped_cards_are_found_in_a_checkout() -> None:
    assert (environment.shipped_config_dir() / "models" / "smollm2-135m-instruct.yaml").is_file()
