"""`make gpu` without a GPU: order, limits, failures, and the whole path of its parts as dry runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path[:] = path


gpu = load("gpu")


def python(code: str, **options: object) -> object:
    return gpu.Part(**({"name": "part", "command": (sys.executable, "-c", code), "limit_s": 20.0} | options))


def test_a_part_that_fails_or_hangs_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    chosen = [
        python("import sys; print('so far'); sys.exit(3)", name="fails"),
        python("import time; print('begun', flush=True); time.sleep(60)", name="hangs", limit_s=2.0),
        python("print(1)", name="lacks", needs="no-such-program-anywhere"),
        python("import os; print(os.environ['FLAG'])", name="runs", environment=(("FLAG", "up"),)),
    ]
    begin_s = time.monotonic()
    outcomes = gpu.run_all(chosen, tmp_path)
    assert time.monotonic() - begin_s < 30
    assert [outcome.state for outcome in outcomes] == [
        "failed: exit status 3",
        "failed: took longer than 2 s",
        "not run: no-such-program-anywhere is not on this machine",
        "ok",
    ]
    assert [outcome.tail.strip() for outcome in outcomes] == ["so far", "begun", "", "up"]
    written = json.loads((tmp_path / gpu.RESULT).read_text())["parts"]
    assert [part["name"] for part in written] == ["fails", "hangs", "lacks", "runs"]
    assert all(sys.executable in part["command"] for part in written), "the command that would run it"


def test_nothing_starts_once_the_time_is_up(tmp_path: Path) -> None:
    (outcome,) = gpu.run_all([python("print(1)")], tmp_path, total_s=1.0)
    assert outcome.state == "not run: the time was up"


def test_everything_fits_into_eight_minutes(tmp_path: Path) -> None:
    assert gpu.TOTAL_S < 480
    parts = gpu.parts(tmp_path, is_dry=False)
    assert parts[0].name == "kernels against references", "what is wrong is not worth measuring"
    first_three = sum(part.limit_s for part in parts[:3])
    assert first_three + 60 < gpu.TOTAL_S, "whatever rights, the engine and energy take, the kernels have a minute"


def test_energy_check_tells_a_counter_that_disagrees() -> None:
    energy = load("energy_gpu")

    class Wrong(energy.ScriptedBoard):  # type: ignore[misc, name-defined]
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
            return int(1.5 * super().nvmlDeviceGetTotalEnergyConsumption(handle))

    for board, agrees in ((energy.ScriptedBoard(), True), (Wrong(), False)):

        def work(stop: threading.Event, board: object = board) -> None:
            board.is_loaded = True  # type: ignore[attr-defined]
            stop.wait()

        facts = energy.check_energy(board, work, idle_s=0.3, load_s=0.5)
        assert facts["agrees"] is agrees
        assert facts["idle"]["instant_median_w"] == 80
        assert facts["load"]["instant_median_w"] == 500
        assert 0.01 < facts["counter_tick_s"] < 0.1


@pytest.mark.torch
def test_workload_is_that_of_nano_vllm() -> None:
    pytest.importorskip("transformers")
    work = load("engine_gpu").qwen3_work(is_dry=False)
    assert sum(len(prompt) for prompt, _ in work.requests) == 142_827
    assert sum(count for _, count in work.requests) == 133_966
    assert len(work.requests) == 256


@pytest.mark.torch
@pytest.mark.slow
def test_the_engines_part_runs_from_end_to_end(tmp_path: Path) -> None:
    """Including transformers' own continuous batching; in a process of its own, as it changes transformers' logging."""
    pytest.importorskip("transformers")
    out = tmp_path / "engine.json"
    command = [sys.executable, "benchmarks/engine_gpu.py", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["is_dry_run"]
    exact, *measured = report["parts"]
    assert exact["state"] == "ok"
    assert exact["facts"]["equal"] == exact["facts"]["sequences"]
    for part in measured:
        assert part["state"] == "ok"
        facts = part["facts"]
        assert facts["equal_to_fp32"] == facts["checked_tokens"] > 0
        assert all(run["joules"] is None and "dry run" in run["energy_source"] for run in facts["runs"])
        assert facts["reference"]["output_tokens"] == facts["output_tokens"], facts["reference"]
        assert facts["times_reference"] > 0
