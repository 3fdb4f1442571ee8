from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from mxn.core.model import ModelSpec
from mxn.fleet.calibration.profile import DecodePoint, Power, PrefillPoint, Profile

from .conftest import Mxn

PROFILE = Profile(
    model="tiny",
    revision="r",
    spec=ModelSpec(
        architecture="llama",
        num_layers=2,
        hidden_size=64,
        vocab_size=500,
        num_heads=4,
        num_kv_heads=2,
        key_dim=16,
        value_dim=16,
        max_context=512,
        num_parameters=100_000,
    ),
    chip="Some Chip",
    chip_cores=2,
    chip_kind=None,
    backend="cpu",
    versions={"mxn": "0"},
    quantisation="int8",
    attention="x",
    program="y",
    threads=2,
    max_step_tokens=512,
    weight_bytes=1e5,
    kv_bytes=1e6,
    kv_bytes_per_token=256.0,
    memory_bytes=None,
    memory_source="no meter",
    load_s={"load": 1.0},
    power=Power(source="none", kind="none", detail="", idle_w=None, busy_w=None),
    rates=None,
    prefill=(PrefillPoint(tokens=64, median_s=0.01, min_s=0.01, max_s=0.01, repetitions=1),),
    decode=(DecodePoint(batch=1, context=32.0, median_s=0.01, min_s=0.01, max_s=0.01, repetitions=5),),
    measured_at="2026-11-24T00:00:00+00:00",
)


def test_profiles_are_imported_listed_and_exported(mxn: Mxn, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    assert mxn("calibrate", "--list", MXN_DATA_DIR=data).out.strip() == "no profiles"
    path = tmp_path / "in.json"
    path.write_text(json.dumps([asdict(PROFILE)]))
    assert mxn("calibrate", "--import", str(path), MXN_DATA_DIR=data).code == 0
    assert "tiny" in mxn("calibrate", "--list", MXN_DATA_DIR=data).out
    assert mxn("calibrate", "--export", str(tmp_path / "out.json"), MXN_DATA_DIR=data).code == 0
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(path.read_text())


def test_a_faulty_file_is_one_error_with_its_place(mxn: Mxn, tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(json.dumps([asdict(PROFILE) | {"weight_bytes": float("nan")}]))
    ran = mxn("calibrate", "--import", str(path))
    assert ran.code == 2
    assert "$[0].weight_bytes: expected a finite number, got nan" in ran.err
    assert mxn("calibrate", "--list", "--import", str(path)).code == 2


def test_a_damaged_store_is_one_error_for_plan_and_list(mxn: Mxn, tmp_path: Path) -> None:
    (tmp_path / "measurements.sqlite").write_bytes(b"no database at all " * 200)
    example = Path(__file__).parent.parent.parent / "configs/examples/single-cpu.yaml"
    for arguments in (("calibrate", "--list"), ("plan", str(example))):
        ran = mxn(*arguments, MXN_DATA_DIR=str(tmp_path))
        assert ran.code == 2
        assert "measurements.sqlite cannot be read" in ran.err
