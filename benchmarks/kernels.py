"""Measures the Triton kernels on the accelerator of this machine, next to what the chip can do and to other libraries.

    python benchmarks/kernels.py --out results.json          all rows: right first, then fast
    python benchmarks/kernels.py --dry-run --target sm_90    what would run, on any machine
    python benchmarks/kernels.py --tune paged_decode         tries tiles, prints rows for a tuning table

Needs torch and triton. Each row is first compared with a float64 reference on fresh random inputs and outputs full of
NaN, then
replayed in a CUDA or HIP graph over inputs larger than an H100's cache (not than an MI300's 256 MB); times are
medians. Both ceilings, a copy and a matrix
product, are measured in the same run. What another library needs and what is not installed is listed as not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from chip_facts import stamp  # noqa: E402
from kernel_rows import Row, normal, rows  # noqa: E402
from mxn_kernels import tuning  # noqa: E402
from mxn_kernels.target import Target  # noqa: E402
from mxn_kernels.triton.launch import record_launches  # noqa: E402

REPEATS = 20  # timed graph replays


@dataclass(kw_only=True)
class Result:
    name: str
    state: str
    microseconds: float | None = None
    spread_percent: float | None = None
    gb_s: float | None = None
    tflops: float | None = None
    share: float | None = None
    error: float | None = None
    goal: tuple[str, float] | None = None
    reached: float | None = None
    launches: list[str] = field(default_factory=list)
    rivals_microseconds: dict[str, float | str] = field(default_factory=dict)


# ---------------------------------------------------------------- measuring


def measure(run: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of one call, and the spread of the middle half in percent, by replays of a graph of calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    calls = max(1, min(50, int(0.005 / (time.perf_counter() - begin))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    for _ in range(2):
        graph.replay()
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / calls)
    quarters = statistics.quantiles(seconds, n=4)
    median = statistics.median(seconds)
    return median, 100 * (quarters[2] - quarters[0]) / median


def ceilings() -> dict[str, float]:
    """Bytes read and written per second by a copy of 2 GiB; operations per second of a bf16 product of 8192 cubed."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    destination = torch.empty_like(source)
    copy_s, _ = measure(lambda: destination.copy_(source))
    left, right = normal("cuda", 8192, 8192), normal("cuda", 8192, 8192)
    product_s, _ = measure(lambda: left @ right)
    return {"copy_bytes_s": 2 * source.numel() * 2 / copy_s, "matmul_flops_s": 2 * 8192**3 / product_s}


def measure_row(
    row: Row, target: Target, limits: dict[str, float], done: dict[str, Result], has_rivals: bool
) -> Result:
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    if free_gib < row.gib + 1:
        return Result(name=row.name, state=f"not run: needs {row.gib + 1:.0f} GiB, {free_gib:.0f} are free")
    if "fp8" in row.name and not target.fp8_dtypes:
        return Result(name=row.name, state=f"not run: {target.name} has no fp8")
    torch.manual_seed(0)
    work = row.make("cuda", target)
    with record_launches() as launches:
        work.run()
    torch.cuda.synchronize()
    found = work.check()
    result = Result(name=row.name, state="ok", error=found, goal=row.goal)
    result.launches = [f"{launch.name}{list(launch.grid)} {launch.options}" for launch in launches]
    if not found <= work.tolerance:
        result.state = f"wrong: error {found:.2g}, allowed {work.tolerance:.2g}"
        return result
    seconds, result.spread_percent = measure(work.run)
    result.microseconds = seconds * 1e6
    result.gb_s = work.bytes / seconds / 1e9
    result.tflops = work.flops / seconds / 1e12 if work.flops else None
    bounds = [work.bytes / limits["copy_bytes_s"], work.flops / limits["matmul_flops_s"]]
    result.share = max(bounds) / seconds
    if row.goal:
        kind, _ = row.goal
        baseline = done.get(row.baseline or "")
        result.reached = {
            "copy": work.bytes / seconds / limits["copy_bytes_s"],
            "tflops": result.tflops,
            "times": baseline.microseconds / result.microseconds if baseline and baseline.microseconds else None,
        }[kind]
    for name, make in work.rivals.items() if has_rivals else ():
        result.rivals_microseconds[name] = rival(name, make)
    return result


def rival(name: str, make: Callable[[], Callable[[], Any]]) -> float | str:
    module = {"sdpa": "torch", "flex_attention": "torch"}.get(name, name)
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        return measure(make())[0] * 1e6
    except Exception as fault:  # another library's failure is a cell of the table, not the end of the run
        torch.cuda.synchronize()
        return f"failed: {type(fault).__name__}: {str(fault)[:120]}"


def tune(op: str, target: Target) -> None:
    """Times tiles on the row that stands for the op, the best first, in the form of a tuning table."""
    name = {
        "paged_decode": "paged_decode B16 8192",
        "ragged_prefill": "ragged_prefill 1 x 16384",
        "shared_prefix_decode": "64 x (8192 shared + 256), shared",
    }[op]
    row = next(row for row in rows() if row.name == name)
    query_rows = (16,) if op == "paged_decode" else (64, 128)
    found = []
    for block_m in query_rows:
        for block_n in (32, 64, 128):
            for warps in (2, 4, 8):
                for stages in (1, 3, 5):
                    tile = {"block_m": block_m, "block_n": block_n, "warps": warps, "stages": stages}
                    tuning.add_table(target.name, {op: [{**tile, "source": "tuned"}]})
                    try:
                        work = row.make("cuda", target)
                        work.run()
                        if work.check() > work.tolerance:
                            continue
                        found.append((measure(work.run)[0], tile))
                    except Exception as fault:
                        print(f"{tile}: {type(fault).__name__}", file=sys.stderr)
    for seconds, tile in sorted(found, key=lambda pair: pair[0])[:10]:
        print(f"{seconds * 1e6:10.1f} us  {json.dumps(tile)}")


# ---------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--out", type=Path, help="write everything as JSON to this file")
    parser.add_argument("--no-rivals", action="store_true", help="leave other libraries out")
    parser.add_argument("--dry-run", action="store_true", help="print what would be launched, without running it")
    parser.add_argument("--target", help="with --dry-run: the chip to plan for, such as sm_90 or gfx942")
    parser.add_argument("--tune", choices=["paged_decode", "ragged_prefill", "shared_prefix_decode"], help="try tiles")
    options = parser.parse_args()
    needed = {row.baseline for row in rows() if options.only in row.name}
    chosen = [row for row in rows() if options.only in row.name or row.name in needed]
    if options.dry_run:
        plan(chosen, Target.named(options.target or "sm_90"))
        return 0
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA or ROCm chip; --dry-run --target sm_90 shows what would run")
    target = Target.of("cuda")
    if options.tune:
        tune(options.tune, target)
        return 0
    facts = stamp()
    facts["target"] = asdict(target) | {"fp8_dtypes": [str(dtype) for dtype in target.fp8_dtypes]}
    facts["repeats"] = REPEATS
    limits = ceilings()
    copy_gb_s, product_tflops = limits["copy_bytes_s"] / 1e9, limits["matmul_flops_s"] / 1e12
    print(f"{facts['chip']}: copy {copy_gb_s:.0f} GB/s, bf16 product {product_tflops:.0f} TFLOP/s")
    print(f"{'row':42} {'us':>10} {'+-%':>5} {'GB/s':>7} {'TFLOP/s':>8} {'share':>6} {'error':>8}  goal")
    done: dict[str, Result] = {}
    for row in chosen:
        result = measure_row(row, target, limits, done, not options.no_rivals)
        done[row.name] = result
        print(line(result), flush=True)
        torch.cuda.empty_cache()
        if options.out:  # after every row, so that what ends this process leaves what it had
            results = [asdict(result) for result in done.values()]
            options.out.write_text(json.dumps({**facts, "ceilings": limits, "rows": results}, indent=1) + "\n")
    return 1 if any(result.state.startswith("wrong") for result in done.values()) else 0


def plan(chosen: Sequence[Row], target: Target) -> None:
    for row in chosen:
        if "fp8" in row.name and not target.fp8_dtypes:
            print(f"{row.name}: not run, {target.name} has no fp8")
            continue
        work = row.make("meta", target)
        with record_launches() as launches:
            work.run()
        print(f"{row.name}: {work.bytes / 1e6:.1f} MB, {work.flops / 1e9:.1f} GFLOP, goal {row.goal or 'none'}")
        for launch in launches:
            print(f"    {launch.name} {launch.grid} = {launch.num_programs} programs, {launch.options}")


def line(result: Result) -> str:
    if result.microseconds is None:
        return f"{result.name:42} {result.state}"
    rate = "" if result.tflops is None else f"{result.tflops:.0f}"
    text = f"{result.name:42} {result.microseconds:10.1f} {result.spread_percent:5.1f} {result.gb_s:7.0f} {rate:>8} "
    text += f"{result.share:6.1%} {result.error:8.1e}  "
    if result.goal and result.reached is not None:
        kind, wanted = result.goal
        text += f"{kind} {result.reached:.2f} of {wanted:g}: {'reached' if result.reached >= wanted else 'missed'}  "
    shown = {
        name: f"{cell:.1f}" if isinstance(cell, float) else cell for name, cell in result.rivals_microseconds.items()
    }
    return text + "  ".join(f"{name} {cell}" for name, cell in shown.items())


if __name__ == "__main__":
    sys.exit(main())
