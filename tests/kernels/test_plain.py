"""The CPU kernels against plain loops in C++: on this CPU, and the NEON ones by cross compiler and emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from mxn_kernels import KernelUnavailable
from mxn_kernels.cpu.build import FLAGS, GENERATED, ISAS, SOURCES, best_isa

pytestmark = [pytest.mark.torch, pytest.mark.slow]  # mxn_kernels.cpu loads torch

CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = Path(__file__).parent


def build(compiler: str, folder: Path, program: str, *changes: str) -> Path:
    for name, generate in GENERATED.items():
        (folder / name).write_text(generate())
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-march=native", "-O3")]
    sources = [*map(str, SOURCES.glob("*.cpp")), str(HERE / program)]
    out = folder / "program"
    command = [compiler, *flags, "-O2", *changes, f"-I{SOURCES}", f"-I{folder}", *sources, "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return out


def test_kernels_of_this_cpu_equal_plain_loops(tmp_path: Path) -> None:
    try:
        isa = best_isa()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    program = build("g++", tmp_path, "plain.cpp", "-march=native", *ISAS[isa])
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("source", ["plain.cpp", "stress.cpp"])
def test_neon_kernels_equal_plain_loops(source: str, tmp_path: Path) -> None:
    for needed in (CROSS_COMPILER, EMULATOR):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    program = build(CROSS_COMPILER, tmp_path, source, "-march=armv8.2-a+dotprod", "-static")
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "done\n", done.stderr
