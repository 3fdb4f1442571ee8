"""The converter's process: progress, errors, last words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mxn.errors import ModelError
from mxn.store.convert import convert_gguf


def _run(code: str, tmp_path: Path) -> list[tuple[str, float]]:
    seen: list[tuple[str, float]] = []
    convert_gguf(
        tmp_path / "x.gguf",
        tmp_path / "out",
        dtype="bf16",
        command=[sys.executable, "-c", code],
        progress=lambda phase, fraction: seen.append((phase, fraction)),
    )
    return seen


def test_progress_lines_are_passed_on_and_other_lines_are_not(tmp_path: Path) -> None:
    code = (
        "print('noise'); print('[1]'); print('{\"phase\": \"weights\", \"fraction\": 0.5}');"
        'print(\'{"phase": "weights", "fraction": 7}\'); print(\'{"phase": 3, "fraction": 1}\')'
    )
    assert _run(code, tmp_path) == [("weights", 0.5), ("weights", 1.0)]


def test_arguments_are_source_folder_and_dtype(tmp_path: Path) -> None:
    code = "import sys, json; print(json.dumps({'phase': ' '.join(sys.argv[1:]), 'fraction': 0}))"
    [(arguments, _)] = _run(code, tmp_path)
    assert arguments == f"{tmp_path / 'x.gguf'} {tmp_path / 'out'} --dtype bf16"


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ('print(\'{"error": "architecture foo is not known"}\'); raise SystemExit(1)', "architecture foo is not known"),
        ("raise SystemExit(3)", "ended with code 3: it said nothing"),
        ("import sys; sys.exit('boom')", "ended with code 1: boom"),
        (
            "import nothing_like_this",
            r"No module named 'nothing_like_this'; converting needs torch: pip install 'mxn\[cpu\]'",
        ),
        ("import os; os.kill(os.getpid(), 9)", "most likely for lack of memory"),
    ],
)
def test_a_failure_carries_the_converters_last_words(tmp_path: Path, code: str, part: str) -> None:
    with pytest.raises(ModelError, match=f"x.gguf could not be converted: .*{part}"):
        _run(code, tmp_path)


def test_a_full_disk_in_the_converter_is_a_full_disk(tmp_path: Path) -> None:
    code = 'print(\'{"error": "OSError: [Errno 28] No space left on device"}\'); raise SystemExit(1)'
    with pytest.raises(OSError, match="No space left on device"):
        _run(code, tmp_path)
