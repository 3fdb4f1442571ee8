from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mxn.errors import ConfigError
from mxn.fleet.calibration import store as store_module
from mxn.fleet.calibration.memory import MemoryObservation
from mxn.fleet.calibration.store import MeasurementStore

LOAD = MemoryObservation(
    family="llama",
    chip="Chip",
    backend="cpu",
    versions="mxn=1",
    quantisation="int8",
    weight_bytes=1e8,
    resident_bytes=6e8,
    estimated_weight_bytes=1.2e8,
    estimated_other_bytes=4e8,
)


def test_a_file_that_is_not_there_reads_as_empty_and_is_not_made(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "deep" / "m.sqlite")
    assert store.profiles() == ()
    assert store.memory() == ()
    assert list(tmp_path.iterdir()) == []


def test_a_newer_profile_of_a_cell_replaces_the_older_one(tmp_path: Path, synthetic: Any) -> None:
    store = MeasurementStore(tmp_path / "deep" / "m.sqlite")
    first = synthetic.profile()
    newer = replace(first, measured_at="2026-12-01T00:00:00+00:00")
    other = replace(first, versions={"mxn": "2"})
    for profile in (first, newer, other):
        store.keep_profiles([profile])
    assert sorted(store.profiles(), key=lambda p: p.measured_at) == [other, newer]
    store.remove_profiles([other])
    assert store.profiles() == (newer,)


def test_loads_are_kept_in_order_and_the_oldest_of_many_dropped(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path / "m.sqlite")
    for number in range(60):
        store.keep_memory(replace(LOAD, resident_bytes=float(number)))
    store.keep_memory(replace(LOAD, family="gemma3", resident_bytes=1.0))
    kept = store.memory()
    assert [one.resident_bytes for one in kept] == [*map(float, range(10, 60)), 1.0]


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    path.write_bytes(b"this is no database, but long enough to be read as one" * 100)
    store = MeasurementStore(path)
    with pytest.raises(ConfigError, match=r"m\.sqlite cannot be read: .*move it away"):
        store.profiles()
    with pytest.raises(ConfigError, match=r"m\.sqlite cannot be written: .*move it away"):
        store.keep_memory(LOAD)


def test_a_file_that_another_process_holds_is_said_to_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY_S", 0.05)
    path = tmp_path / "m.sqlite"
    store = MeasurementStore(path)
    store.keep_memory(LOAD)
    holder = sqlite3.connect(path)
    try:
        holder.execute("begin exclusive")
        with pytest.raises(ConfigError, match="locked; another process holds it"):
            store.keep_memory(LOAD)
        with pytest.raises(ConfigError, match="locked; another process holds it"):
            store.memory()
    finally:
        holder.close()
    assert len(store.memory()) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, synthetic: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    store = MeasurementStore(tmp_path / "file" / "m.sqlite")
    with pytest.raises(ConfigError, match="cannot be written"):
        store.keep_profiles([synthetic.profile()])


def test_a_stored_profile_with_a_fault_is_refused_with_its_place(tmp_path: Path, synthetic: Any) -> None:
    path = tmp_path / "m.sqlite"
    MeasurementStore(path).keep_profiles([synthetic.profile()])
    with sqlite3.connect(path) as connection:
        connection.execute("""update profiles set json = replace(json, '"chip_cores": 2', '"chip_cores": NaN')""")
    connection.close()
    with pytest.raises(ConfigError, match=r"m\.sqlite, Made-up Chip.*chip_cores: expected a finite number"):
        MeasurementStore(path).profiles()
