"""Choosing by measurement: what is timed, when another way is worth it, and what is remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mxn.attention.reference import ReferenceAttention  # noqa: E402
from mxn.core.model import LoadSettings, Model  # noqa: E402
from mxn.runner.neighbours import watch_others  # noqa: E402
from mxn.runner.tuning import Memory, choose, fastest, measure, thread_counts  # noqa: E402

pytestmark = pytest.mark.torch

TIMES = {"batch 1": {"step": 4.0, "modules": 9.0}, "batch 8": {"step": 7.0, "modules": 10.0}}


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ways(clock: Clock, **seconds: float) -> dict[str, Callable[[tuple[int, int]], None]]:
    def run(name: str) -> Callable[[tuple[int, int]], None]:
        def take(shape: tuple[int, int]) -> None:
            clock.now_s += seconds[name] * shape[0]

        return take

    return {name: run(name) for name in seconds}


def measured(clock: Clock, budget_s: float, **seconds: float) -> dict[str, dict[str, float]]:
    prepare = {name: lambda: None for name in seconds}
    cases = {"one": (1, 1), "eight": (8, 1), "many": (100, 1)}
    return measure(ways(clock, **seconds), prepare, cases, budget_s=budget_s, clock=clock)


def test_every_way_is_timed_in_every_case() -> None:
    times = measured(Clock(), 1e9, step=0.001, modules=0.002)
    assert times == {
        "one": pytest.approx({"step": 1, "modules": 2}),
        "eight": pytest.approx({"step": 8, "modules": 16}),
        "many": pytest.approx({"step": 100, "modules": 200}),
    }


def test_large_model_is_timed_in_one_case_twice_at_most() -> None:
    clock = Clock()
    times = measured(clock, 1.0, step=3.0, modules=4.0)
    assert list(times) == ["one"]
    assert clock.now_s == 2 * (3 + 4)


def test_fastest_over_all_cases_and_first_unless_clearly_beaten() -> None:
    assert fastest(TIMES) == "step"
    assert fastest({"one": {"a": 4.0, "b": 3.9}, "two": {"a": 4.0, "b": 3.9}}) == "a"
    assert fastest({"one": {"a": 4.0, "b": 3.0}, "two": {"a": 4.0, "b": 4.4}}) == "b"


def test_thread_counts_begin_with_all_cores() -> None:
    assert [thread_counts(cores) for cores in (1, 2, 6, 64)] == [[1], [2, 1], [6, 3, 1], [64, 32, 16, 1]]


def test_outcome_is_remembered_for_the_same_facts_and_ways_only(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "new", {"machine": "a", "model": "1"})
    names = ["step", "modules"]
    assert memory.recall(names) is None
    memory.keep(names, TIMES)
    assert memory.recall(names) == TIMES
    assert Memory(tmp_path / "new", {"machine": "a", "model": "1"}, is_read=False).recall(names) is None
    assert Memory(tmp_path / "new", {"machine": "b", "model": "1"}).recall(names) is None
    assert memory.recall(["modules", "step"]) is None
    assert memory.about("machine", model="1").recall(names) == TIMES
    assert memory.about("machine").recall(names) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"times": {}}', '{"times": {"one": {"step": "fast"}}}'])
def test_damaged_memory_is_as_none(tmp_path: Path, text: str) -> None:
    memory = Memory(tmp_path, {})
    memory.keep(["step"], {"one": {"step": 1.0}})
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert memory.recall(["step"]) is None


def test_folder_that_cannot_be_written_is_survived(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    memory = Memory(tmp_path / "file", {})
    memory.keep(["step"], {"one": {"step": 1.0}})
    assert memory.recall(["step"]) is None


class Program:
    """Computes nothing and notes that it was asked."""

    detail = ""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.name, self.num_runs, self._work = name, 0, work

    def __call__(self, inputs: Any) -> Any:
        self.num_runs += 1
        self._work()
        return None


def chosen(memory: Memory, share: float, used: list[int]) -> tuple[Any, int, list[str], list[Program]]:
    """A choice between a slow program and one that does nothing, on one thread or two."""
    layers = [ReferenceAttention([], 8, 4)]
    programs = [Program("slow", lambda: torch.ones(3000, 3000).sum()), Program("quick", lambda: None)]
    found = choose(
        programs,
        [2, 1],
        use_threads=used.append,
        attention=layers[0],
        memory=memory,
        others=lambda: lambda: share,
    )
    return *found, programs


def test_faster_program_is_chosen_and_remembered(tmp_path: Path) -> None:
    used: list[int] = []
    program, threads, notes, programs = chosen(Memory(tmp_path, {}), 0.0, used)
    assert (program.name, threads, used[-1]) == ("quick", 2, 2)
    assert notes[0].startswith("quick on 2 threads, measured now: ")
    assert "slow on 2 threads" in notes[0]
    assert "slow on 1 thread" in notes[0]
    assert all(program.num_runs for program in programs)
    program, threads, notes, programs = chosen(Memory(tmp_path, {}), 0.0, used)
    assert (program.name, threads) == ("quick", 2)
    assert notes[0].startswith("quick on 2 threads, measured at an earlier start: ")
    assert not any(program.num_runs for program in programs)


def test_threads_are_not_compared_beside_busy_neighbours(tmp_path: Path) -> None:
    _, threads, notes, _ = chosen(Memory(tmp_path, {}), 0.4, [])
    assert threads == 2
    assert notes[1] == "2 threads: not compared, other processes took 40% of the cores"
    assert not list(tmp_path.iterdir())


def test_own_work_is_not_that_of_others() -> None:
    share = watch_others()
    a = torch.randn(600, 600)
    for _ in range(40):
        a = (a @ a).clamp(-1, 1)
    assert 0 <= share() <= 1.2


def load(model: Model, memory: Memory | None, **changes: Any) -> Any:
    from mxn.runner.cpu import load_cpu_runner

    settings = LoadSettings(**({"kv_bytes": 2**22, "max_num_seqs": 8} | changes))
    return load_cpu_runner(
        model, settings, cores=2, free_bytes=lambda: 2**32, progress=lambda phase, fraction: None, memory=memory
    )


def test_loaded_model_says_what_was_measured(make_model: Callable[..., Any], tmp_path: Path, kernels: None) -> None:
    _, saved = make_model("llama")
    memory = Memory(tmp_path / "tuning", {"machine": "this"})
    runner = load(saved, memory)
    if runner.quantisation == "int8":
        assert any(note.startswith("numbers int8: a linear layer of 1 row, ") for note in runner.notes)
        assert any("step program on " in note and "transformers modules on 2 threads" in note for note in runner.notes)
    assert f"{runner.threads} compute threads, the fastest" in runner.notes
    assert runner.notes[-1].startswith(f"forward: {runner.program}")


def test_setting_wins_over_measurement(make_model: Callable[..., Any], tmp_path: Path, kernels: None) -> None:
    _, saved = make_model("llama")
    options = (("program", "modules"),)
    runner = load(saved, Memory(tmp_path / "tuning", {}), quantisation="int8", threads=1, options=options)
    assert (runner.program, runner.threads) == ("transformers modules", 1)
    assert "1 compute threads, as set" in runner.notes
    assert not (tmp_path / "tuning").exists()
    off = load(saved, Memory(tmp_path / "tuning", {}), options=(("tune", "off"),))
    assert (off.program, off.threads, off.quantisation) == ("step program", 2, "int8")
    assert not (tmp_path / "tuning").exists()


def test_model_computes_the_same_on_any_number_of_threads(
    make_model: Callable[..., Any], decode: Callable[..., list[list[int]]], kernels: None
) -> None:
    _, saved = make_model("qwen3")
    prompt = [list(range(3, 30))]
    tokens = [
        decode(load(saved, None, quantisation="int8", threads=threads), prompt, 6, budget=64) for threads in (1, 2, 3)
    ]
    assert tokens[0] == tokens[1] == tokens[2]
