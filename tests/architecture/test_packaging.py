"""What a wheel holds, built as a release would be."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of all files in the wheel of this tree."""
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_source_file_of_both_packages(wheel_names: set[str]) -> None:
    for folder in (ROOT / "src", ROOT / "kernels"):
        package = next(path for path in folder.iterdir() if (path / "__init__.py").exists())
        wanted = {str(path.relative_to(folder)) for path in package.rglob("*") if path.suffix in SOURCE_SUFFIXES}
        assert wanted <= wheel_names, sorted(wanted - wheel_names)
        assert f"{package.name}/py.typed" in wheel_names


def test_wheel_holds_all_cards(wheel_names: set[str]) -> None:
    cards = {f"mxn/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert cards
    assert cards <= wheel_names, sorted(cards - wheel_names)


def test_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    strays = {name for name in wheel_names if not name.startswith(("mxn/", "mxn_kernels/", "mxn-"))}
    assert not strays, sorted(strays)
    built = {name for name in wheel_names if name.endswith((".so", ".o", ".pyc"))}
    assert not built, sorted(built)


def test_kernels_build_alone(tmp_path: Path) -> None:
    names = build(ROOT / "kernels", tmp_path)
    assert "mxn_kernels/__init__.py" in names
    assert not {name for name in names if not name.startswith(("mxn_kernels/", "mxn_kernels-"))}


SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".hpp", ".inc"}


def build(project: Path, into: Path) -> set[str]:
    """Builds the project's wheel into a folder and returns the names in it."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}
