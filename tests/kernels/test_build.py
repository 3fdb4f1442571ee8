"""Building the kernel library: what its name depends on, and what happens when something is missing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mxn_kernels import KernelUnavailable
from mxn_kernels.cpu import build as building
from mxn_kernels.cpu.build import Cpu, best_isa

pytestmark = pytest.mark.torch  # mxn_kernels.cpu loads torch

ZEN = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: avx2 f16c fma avx512f avx512bw "
    "avx512vl avx512_vnni avx_vnni\n\nprocessor\t: 1\nmodel name\t: other\n"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder and a compiler that only notes its arguments, since a real build takes seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_compiler(
        tmp_path, monkeypatch, 'echo "$@" >> "$log"; while [ "$1" != -o ]; do shift; done; sleep 0.1; echo lib > "$2"'
    )
    monkeypatch.setattr(Cpu, "detect", staticmethod(lambda: Cpu.parse(ZEN)))
    return tmp_path


def use_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, version: str = "c++ 1.0") -> None:
    path = folder / "c++-stand-in"
    path.write_text(f'#!/bin/sh\nlog="{folder}/calls"\n[ "$1" = --version ] && echo "{version}" && exit 0\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def calls(home: Path) -> list[str]:
    return (home / "calls").read_text().splitlines()


def test_cpu_is_read_from_the_first_processor() -> None:
    cpu = Cpu.parse(ZEN)
    assert "AMD EPYC" in cpu.model
    assert cpu.isas() == ["avx512", "avxvnni", "avx2"]


def test_cpu_without_vnni_takes_avx2() -> None:
    assert best_isa(Cpu(model="old", flags=frozenset({"avx2", "f16c", "fma", "avx512f"}))) == "avx2"


def test_cpu_without_avx2_is_refused_by_name() -> None:
    with pytest.raises(KernelUnavailable, match="old lacks avx2, f16c"):
        best_isa(Cpu(model="old", flags=frozenset({"fma"})))


ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\nprocessor\t: 1\n"


def test_arm_with_dot_products_takes_neon_and_without_is_refused() -> None:
    cpu = Cpu.parse(ARM)
    assert "0x41" in cpu.model
    assert cpu.isas() == ["neon"]
    with pytest.raises(KernelUnavailable, match=r"need asimd, asimddp; .*0xd40.* lacks asimddp"):
        best_isa(Cpu.parse(ARM.replace("asimddp ", "")))


def test_library_is_built_once(home: Path) -> None:
    first = building.build("avx2")
    assert building.build("avx2") == first
    assert first.parent == home / "cache/mxn/kernels"
    assert len(calls(home)) == 1
    assert "-mno-avx512f" in calls(home)[0]


def test_two_builders_build_once(home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: building.build("avx512"), range(4)))
    assert len(paths) == 1
    assert len(calls(home)) == 1


def test_name_depends_on_cpu_compiler_flags_and_sources(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {building.build("avx2").name}
    names.add(building.build("avx2", extra_flags=("-g",)).name)
    use_compiler(home, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo lib > "$2"', version="c++ 2.0")
    names.add(building.build("avx2").name)
    monkeypatch.setattr(Cpu, "detect", staticmethod(lambda: Cpu.parse(ZEN.replace("EPYC", "Ryzen"))))
    names.add(building.build("avx2").name)
    monkeypatch.setattr(Cpu, "detect", staticmethod(lambda: Cpu.parse(ZEN.replace("avx_vnni", "gfni avx_vnni"))))
    names.add(building.build("avx2").name)
    copied = home / "src"
    copied.mkdir()
    for source in building.SOURCES.iterdir():
        (copied / source.name).write_text(source.read_text())
    with open(copied / "simd.h", "a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(building, "SOURCES", copied)
    names.add(building.build("avx2").name)
    assert len(names) == 6


def test_failed_build_leaves_nothing_and_shows_the_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(home, monkeypatch, 'echo "no such register" >&2; exit 1')
    with pytest.raises(KernelUnavailable, match="no such register"):
        building.build("avx2")
    assert [p.suffix for p in (home / "cache/mxn/kernels").iterdir()] == [".lock"]


def test_killed_build_leaves_no_library(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(home, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo half > "$2"; kill -9 $$')
    with pytest.raises(KernelUnavailable):
        building.build("avx2")
    assert not list((home / "cache/mxn/kernels").glob("*.so"))


def test_missing_compiler_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(KernelUnavailable, match=r"tried no-such-compiler, g\+\+, c\+\+\); install g\+\+"):
        building.build("avx2")


def test_unknown_or_unfit_instruction_set_is_refused(home: Path) -> None:
    with pytest.raises(KernelUnavailable, match="'neon' is not available; this CPU has: avx512, avxvnni, avx2"):
        building.build("neon")


def test_unwritable_cache_falls_back_to_a_private_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    path = building.build("avx2")
    assert path.exists()
    assert path.parent.parent == home
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "cannot write to" in caplog.text


def test_folder_that_others_may_write_is_not_trusted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    first = building.build("avx2").parent
    first.chmod(0o777)
    assert building.build("avx2").parent != first


def test_no_folder_at_all_is_a_clear_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "cache").write_text("a file")
    (home / "file").write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(home / "file"))
    with pytest.raises(KernelUnavailable, match="no folder to build kernels in"):
        building.build("avx2")


def test_damaged_library_is_built_again(tmp_path: Path) -> None:
    """In a process of its own: a library stays loaded for life."""
    code = (
        "from mxn_kernels.cpu import load_library\n"
        "from mxn_kernels.cpu.build import build, best_isa\n"
        "path = build(best_isa())\n"
        "path.write_bytes(path.read_bytes()[:1000])\n"
        "assert load_library().path == path\n"
        "print('loaded')"
    )
    try:
        best_isa()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "loaded\n", done.stderr
