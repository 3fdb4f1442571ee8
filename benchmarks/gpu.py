"""Everything that needs a GPU, in one command and under eight minutes: `make gpu`.

    python benchmarks/gpu.py                 JSON into $OUT, else benchmarks/results/
    python benchmarks/gpu.py --dry-run       the same order, limits and JSON on a CPU with tiny shapes

Needs torch, triton, transformers and numpy, and nvidia-ml-py for energy. A part that fails, or takes longer than its
limit, is recorded and the next one runs. What was not run is listed with the command that runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TOTAL_S = 470.0
RESULT = "gpu.json"
_LEAST_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command. limit_s: it is ended after so long. writes: the JSON file that it leaves in the folder, if any.

    needs: a program without which it cannot run. environment: variables beside this process's own.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    writes: str | None = None
    needs: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(kw_only=True)
class Outcome:
    """state: "ok", "failed: ..." or "not run: ..."; tail: the last of what it printed."""

    name: str
    state: str
    seconds: float
    command: str
    writes: str | None
    tail: str


def parts(folder: Path, *, is_dry: bool) -> list[Part]:
    """In order of weight: rights first, then the engine, then the rest, so that lack of time costs the least."""
    python, dry = sys.executable, (("--dry-run",) if is_dry else ())
    check = (python, "-W", "ignore", "-m", "mxn_kernels.testing.check")
    few = ("--only", "silu_mul") if is_dry else ()

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (python, f"benchmarks/{name}.py", *arguments)

    def out(name: str) -> tuple[str, str]:
        return ("--out", str(folder / name))

    kernels = script("kernels", *dry, *(() if is_dry else out("kernels.json")))
    return [
        Part(
            name="kernels against references",
            command=(*check, *few, "--json", str(folder / "kernel-checks.json")),
            limit_s=110,
            writes="kernel-checks.json",
            environment=(("TRITON_INTERPRET", "1" if is_dry else "0"),),
        ),
        Part(
            name="engine",
            command=script("engine_gpu", *dry, *out("engine.json"), "--repeats", "1", "--limit-s", "150"),
            limit_s=230,
            writes="engine.json",
        ),
        Part(name="energy", command=script("energy_gpu", *dry, *out("energy.json")), limit_s=50, writes="energy.json"),
        Part(
            name="kernel benchmark",
            command=kernels,
            limit_s=110,
            writes=None if is_dry else "kernels.json",
        ),
        Part(
            name="host",
            command=script(
                "host_step",
                *(("--sequences", "8", "--steps", "9") if is_dry else ()),
                "--json",
                str(folder / "host.json"),
            ),
            limit_s=40,
            writes="host.json",
        ),
        Part(
            name="memory checker",
            command=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *check, "--only", "float16"),
            limit_s=60,
            needs="compute-sanitizer",
        ),
    ]


def run(part: Part, left_s: float, folder: Path) -> Outcome:
    """Runs one part in a process group of its own, which ends with it."""
    command = " ".join(part.command)
    outcome = Outcome(name=part.name, state="ok", seconds=0.0, command=command, writes=part.writes, tail="")
    if part.needs and shutil.which(part.needs) is None:
        outcome.state = f"not run: {part.needs} is not on this machine"
        return outcome
    if left_s < _LEAST_S:
        outcome.state = "not run: the time was up"
        return outcome
    limit_s = min(part.limit_s, left_s)
    paths = [str(ROOT / "kernels"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **dict(part.environment),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    log = folder / f"{part.name.replace(' ', '-')}.log"
    begin_s = time.monotonic()
    with log.open("wb") as stream:
        child = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit_s)
            outcome.state = "ok" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            outcome.state = f"failed: took longer than {limit_s:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    outcome.seconds = round(time.monotonic() - begin_s, 1)
    outcome.tail = log.read_text(errors="replace")[-4000:]
    return outcome


def run_all(chosen: Sequence[Part], folder: Path, total_s: float = TOTAL_S) -> list[Outcome]:
    """All parts within the time, their outcomes on disk after each."""
    end_s = time.monotonic() + total_s
    outcomes: list[Outcome] = []
    for part in chosen:
        print(f"== {part.name}", flush=True)
        outcome = run(part, end_s - time.monotonic(), folder)
        outcomes.append(outcome)
        print(outcome.tail)
        print(f"== {part.name}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)
        report = {
            "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "parts": [asdict(o) for o in outcomes],
        }
        (folder / RESULT).write_text(json.dumps(report, indent=1) + "\n")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="the part of this name")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, help="folder for the results; default $OUT, else benchmarks/results")
    options = parser.parse_args()
    folder = (options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks/results")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts(folder, is_dry=options.dry_run) if options.only in (None, part.name)]
    if not chosen:
        parser.error(f"no part is named {options.only!r}; there are {[p.name for p in parts(folder, is_dry=True)]}")
    outcomes = run_all(chosen, folder)
    for outcome in outcomes:
        if outcome.state != "ok":
            print(f"{outcome.name}: {outcome.state}\n    {outcome.command}")
    return 1 if any(outcome.state.startswith("failed") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
