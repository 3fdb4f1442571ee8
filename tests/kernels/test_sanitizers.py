"""The CPU kernels under the thread, address and undefined-behaviour sanitizers, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mxn_kernels import KernelUnavailable
from mxn_kernels.cpu.build import FLAGS, GENERATED, ISAS, SOURCES, best_isa

pytestmark = pytest.mark.torch  # mxn_kernels.cpu loads torch

SANITIZERS = {"thread": "thread", "address": "address,undefined"}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_stress_shows_no_fault(sanitizer: str, tmp_path: Path) -> None:
    try:
        isa = best_isa()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    for name, generate in GENERATED.items():
        (tmp_path / name).write_text(generate())
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    flags += ["-O1", "-g1", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all", *ISAS[isa]]
    sources = [*SOURCES.glob("*.cpp"), Path(__file__).parent / "stress.cpp"]
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *flags, f"-I{SOURCES}", f"-I{tmp_path}", *map(str, sources), "-o", str(tmp_path / "stress")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and f"lib{sanitizer[0]}san" in built.stderr:
        pytest.skip(f"{compiler} has no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    # Without address randomisation: the thread sanitizer of older compilers cannot place its shadow otherwise.
    done = subprocess.run(["setarch", "-R", str(tmp_path / "stress")], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr[-4000:]


def test_fork_neither_hangs_nor_differs() -> None:
    """The child has none of the threads: it computes alone, and its exit waits for nobody."""
    code = """
import os, torch
from mxn_kernels.cpu import Workspace
from mxn_kernels.int8_linear import int8_linear, pack_int8
space = Workspace(3)
x, w = torch.randn(20, 300), torch.randn(400, 300)
packed = pack_int8(w, workspace=space)
expected = int8_linear(x, packed, workspace=space)
child = os.fork()
same = torch.equal(int8_linear(x, packed, workspace=space), expected)
if child:
    _, status = os.waitpid(child, 0)
    print(same, status)
else:
    raise SystemExit(0 if same else 1)
"""
    try:
        best_isa()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True 0\n", done.stderr
