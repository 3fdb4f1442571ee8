"""Compiles every kernel for chips that are not here: `python -m mxn_kernels.aot`.

Needs Triton and no accelerator. It proves that kernels compile and fit a chip, not that they are right: for that the
tests run
them, on the chip or under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxn_kernels.target import Target
from mxn_kernels.testing.launches import cases
from mxn_kernels.triton.launch import INTERPRET, Launch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
# What a thread can address; more is spilled to memory.
REGISTER_LIMIT = {"nvidia": 255, "amd": 512}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What one kernel takes of a chip.

    Registers and spills are per thread, spills in bytes; None where the tools do not say.
    """

    target: str
    case: str
    kernel: str
    options: dict[str, Any]
    seconds: float
    shared_bytes: int
    shared_limit: int
    registers: int | None
    spill_bytes: int | None
    error: str | None = None

    @property
    def fits(self) -> bool:
        return self.error is None and self.shared_bytes <= self.shared_limit


def compile_launch(launch: Launch, target: Target, case: str) -> Compiled:
    """Compiles one launch as it would be on the chip: same types, constants, alignments and options."""
    begin = time.perf_counter()
    common = {"target": target.name, "case": case, "kernel": launch.name, "options": launch.options}
    try:
        built = triton.compile(source_of(launch), target=_gpu_target(target), options=dict(launch.options))
    except Exception as fault:
        message = f"{type(fault).__name__}: {str(fault).strip()}"
        return Compiled(
            **common,
            seconds=round(time.perf_counter() - begin, 2),
            shared_bytes=0,
            shared_limit=target.shared_memory_bytes,
            registers=None,
            spill_bytes=None,
            error=message,
        )
    registers, spills = _registers(built.asm, target)
    return Compiled(
        **common,
        seconds=round(time.perf_counter() - begin, 2),
        shared_bytes=built.metadata.shared,
        shared_limit=target.shared_memory_bytes,
        registers=registers,
        spill_bytes=spills,
    )


def compile_all(targets: Sequence[str], only: str = "") -> list[Compiled]:
    """All cases of all targets whose names contain `only`, each kernel once."""
    results = []
    for name in targets:
        target = Target.named(name)
        for case in cases(target):
            if only in case.name:
                results += [compile_launch(launch, target, case.name) for launch in case.launches(target)]
    return results


def source_of(launch: Launch) -> ASTSource:
    """The kernel with its arguments' types as Triton would specialise them: ones constant, multiples of 16 told."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind = "constexpr"
        if isinstance(value, torch.Tensor):
            kind = f"*{_TYPES[value.dtype]}"
            is_aligned = value.storage_offset() * value.itemsize % 16 == 0
            is_aligned = is_aligned and not parameter.do_not_specialize_on_alignment
        elif not parameter.is_constexpr and isinstance(value, float):
            kind, is_aligned = "fp32", False
        elif not parameter.is_constexpr and isinstance(value, int) and (value != 1 or parameter.do_not_specialize):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_aligned = value % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(position,)] = value
        elif is_aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mxn_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    options = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("the interpreter is on (TRITON_INTERPRET); kernels cannot be compiled in this process")
    results = compile_all(options.targets, options.only)
    print(f"{'target':8} {'case':44} {'kernel':22} {'s':>5} {'shared':>8} {'of':>8} {'regs':>5} {'spill':>6}")
    for row in results:
        shown = ["-" if n is None else str(n) for n in (row.registers, row.spill_bytes)]
        numbers = f"{row.seconds:5.1f} {row.shared_bytes:8} {row.shared_limit:8} {shown[0]:>5} {shown[1]:>6}"
        remark = "" if row.fits else f"  {row.error or 'does not fit'}"
        print(f"{row.target:8} {row.case:44} {row.kernel:22} {numbers}{remark}")
    if options.json:
        facts = {"triton": triton.__version__, "torch": torch.__version__}
        options.json.write_text(json.dumps({**facts, "results": [asdict(row) for row in results]}, indent=1))
    failed = [row for row in results if not row.fits]
    print(f"{len(results)} kernels, {len(failed)} do not compile or fit")
    return 1 if failed or not results else 0


def _gpu_target(target: Target) -> GPUTarget:
    if target.vendor == "amd":
        return GPUTarget("hip", target.name, target.warp_size)
    return GPUTarget("cuda", int(target.name.removeprefix("sm_")), target.warp_size)


def _registers(asm: dict[str, Any], target: Target) -> tuple[int | None, int | None]:
    if target.vendor == "amd":
        text = asm["amdgcn"]
        counts = [int(n) for name in ("vgpr_count", "agpr_count") for n in re.findall(rf"\.{name}:\s+(\d+)", text)[:1]]
        spills = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return max(counts, default=None), int(spills[0]) if spills else None
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        done = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (None, None)


if __name__ == "__main__":
    sys.exit(main())
