from __future__ import annotations

import json
from pathlib import Path

from .conftest import Mxn

EXAMPLES = Path(__file__).parent.parent.parent / "configs/examples"


def _trace(folder: Path) -> Path:
    path = folder / "trace.csv"
    rows = [f"2023-11-16 18:{i // 60:02d}:{i % 60:02d}.0000000,{100 + i},{1 + i % 40}" for i in range(120)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return path


def test_a_trace_is_replayed_and_said_to_rest_on_data_sheets(mxn: Mxn, tmp_path: Path) -> None:
    ran = mxn("simulate", str(EXAMPLES / "mixed.yaml"), "--trace", str(_trace(tmp_path)))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("# uncalibrated")
    assert all(name in ran.out for name in ("large", "chat", "small"))


def test_json_is_the_same_for_the_same_seed(mxn: Mxn, tmp_path: Path) -> None:
    arguments = ("simulate", str(EXAMPLES / "mixed.yaml"), "--trace", f"chat={_trace(tmp_path)}", "--json")
    first, second = mxn(*arguments), mxn(*arguments)
    assert first.out == second.out
    assert {d["name"]: d["served"] for d in json.loads(first.out)["deployments"]} == {
        "large": 0,
        "chat": 120,
        "small": 0,
    }


def test_a_trace_that_cannot_be_read_is_one_error(mxn: Mxn, tmp_path: Path) -> None:
    ran = mxn("simulate", str(EXAMPLES / "mixed.yaml"), "--trace", str(tmp_path / "none.csv"))
    assert ran.code == 2
    assert "none.csv" in ran.err
    twice = ("--trace", str(_trace(tmp_path))) * 2
    assert "given twice" in mxn("simulate", str(EXAMPLES / "mixed.yaml"), *twice).err
