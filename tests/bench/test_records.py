import errno
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mxn.bench.records import SCHEMA_FILE, DiskError, config_of, contradictions, load, save, schema
from mxn.core.model import LoadSettings
from mxn.errors import ConfigError

from .made import record, report


def test_shipped_schema_is_that_of_the_code() -> None:
    """To renew it: python -c "from mxn.bench.records import *; SCHEMA_FILE.write_bytes(schema())"."""
    assert SCHEMA_FILE.read_bytes() == schema()


def test_report_survives_the_disk(tmp_path: Path) -> None:
    made = report(record(), record(watts=None))
    save(made, tmp_path / "deep" / "r.json")
    assert load(tmp_path / "deep" / "r.json") == made


def test_full_disk_leaves_the_old_file_and_no_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    save(report(record()), path)
    before = path.read_bytes()

    def write_bytes(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(DiskError, match="No space left on device"):
        save(report(record(), record()), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_real_full_disk_is_told() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(DiskError):
        save(report(record()), Path("/dev/full/r.json"))


def test_newer_schema_is_refused_by_number(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save(replace(report(record()), schema_version=3), path)
    with pytest.raises(ConfigError, match="schema version 3; this mxn reads 1 and 2"):
        load(path)


@pytest.mark.parametrize("change", [("num_output_tokens", 310), ("values", (100.0,))])
def test_edited_figures_contradict_each_other(change: tuple[str, object]) -> None:
    assert contradictions(report(record())) == []
    (text,) = contradictions(report(replace(record(), **dict([change]))))[:1]
    assert text.startswith("mxn, W2c8:")


def test_tokens_per_watt_without_energy_is_a_contradiction() -> None:
    lost = replace(record(), energy_j=record(watts=None).energy_j)
    assert "tokens_per_watt without energy_j" in contradictions(report(lost))[0]


def test_settings_are_told_in_words() -> None:
    settings = asdict(LoadSettings(threads=2, options=(("prefill", "int8"),)))
    found = config_of(settings)
    assert {"threads=2", "quantisation=auto", "options.prefill=int8"} <= set(found)


def test_cost_follows_from_price_and_speed() -> None:
    assert record((100.0,), price_per_hour=3.6).cost_per_million_tokens == pytest.approx(10.0)
    assert record().cost_per_million_tokens is None
