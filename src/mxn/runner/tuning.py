"""Which way of computing a step is fastest on this machine: measured when a model is loaded, remembered for later."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from mxn.attention.base import AttentionBackend
from mxn.runner.forward import ForwardProgram
from mxn.runner.inputs import build_inputs
from mxn.runner.neighbours import watch_others
from mxn.runner.torch_runner import dummy_batch

log = logging.getLogger(__name__)

CASES = {"batch 1": (1, 1), "batch 8": (8, 1), "prompt of 128": (1, 128)}
"""What is timed: sequences and new tokens of each."""

BUDGET_S = 1.0
"""No further case is begun after this long; a case under way is finished."""

WORTH = 0.95
"""Another way is taken when it needs less than this share of the first one's time: equal runs differ as much."""

MAX_OTHERS = 0.05
"""Share of the cores' time that other processes may take while threads are compared: beside a busy neighbour fewer
threads look faster than they are, and that must not be remembered."""

_TURNS = 3


def thread_counts(cores: int) -> list[int]:
    """What is tried where nobody set it: all cores, a half, a quarter, one."""
    return sorted({cores, max(1, cores // 2), max(1, cores // 4), 1}, reverse=True)


def choose(
    programs: Sequence[ForwardProgram],
    threads: Sequence[int],
    *,
    use_threads: Callable[[int], None],
    attention: AttentionBackend,
    memory: Memory,
    others: Callable[[], Callable[[], float]] = watch_others,
) -> tuple[ForwardProgram, int, list[str]]:
    """The fastest program and number of threads, with notes that say what was measured.

    Args: programs: the first is taken where nothing can be said, as is the first of `threads`; only the first is tried
    on fewer. use_threads: makes all programs compute on so many threads. memory: where an earlier outcome is looked for
    and this one is kept. others: see `watch_others`.
    """
    ways = {f"{program.name} on {_count(threads[0])}": (program, threads[0]) for program in programs}
    ways |= {f"{programs[0].name} on {_count(number)}": (programs[0], number) for number in threads[1:]}
    notes: list[str] = []
    best = next(iter(ways))
    if len(ways) > 1:
        times = memory.recall(list(ways))
        source = "measured at an earlier start"
        if times is None:
            share = others()
            times = measure(
                {name: partial(_run, program, attention) for name, (program, _) in ways.items()},
                {name: partial(use_threads, number) for name, (_, number) in ways.items()},
                _shapes(attention),
            )
            source = "measured now"
            taken = share()
            if taken <= MAX_OTHERS or len(threads) == 1:
                memory.keep(list(ways), times)
            else:
                notes.append(f"{_count(threads[0])}: not compared, other processes took {taken:.0%} of the cores")
                equal = [name for name, (_, number) in ways.items() if number == threads[0]]
                times = {case: {name: of_case[name] for name in equal} for case, of_case in times.items()}
        best = fastest(times)
        notes.insert(0, _note(times, best, source))
    program, number = ways[best]
    use_threads(number)
    return program, number, notes


def measure(
    runs: Mapping[str, Callable[[tuple[int, int]], None]],
    prepare: Mapping[str, Callable[[], None]],
    shapes: Mapping[str, tuple[int, int]],
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Milliseconds of each way in each case, the best of a few turns; ways take turns, so a busy spell hits all.

    Returns: case to way to ms. At least the first case is there, and every case has all ways.
    """
    began, times = clock(), {}
    for case, shape in shapes.items():
        if times and clock() - began > budget_s:
            break
        best = dict.fromkeys(runs, float("inf"))
        for turn in range(
            1 + _TURNS
        ):  # the first turn builds plans and touches memory; it counts if it is the only one
            if turn > 1 and clock() - began > budget_s:
                break
            for name, run in runs.items():
                prepare[name]()
                started = clock()
                run(shape)
                best[name] = min(best[name], (clock() - started) * 1e3)
        times[case] = best
    return times


def fastest(times: Mapping[str, Mapping[str, float]]) -> str:
    """The way with the smallest product of times over all cases; the first one unless another is clearly ahead."""
    ways = list(next(iter(times.values())))
    first = ways[0]

    def relative(way: str) -> float:
        product = 1.0
        for of_case in times.values():
            product *= of_case[way] / of_case[first]
        return product ** (1 / len(times))

    best = min(ways, key=relative)
    return best if relative(best) < WORTH else first


class Memory:
    """Outcomes of earlier starts: one small file per key in the user's cache."""

    def __init__(self, folder: Path | None, facts: Mapping[str, object], *, is_read: bool = True) -> None:
        """Args: folder: None remembers nothing. facts: everything that an outcome depends on. is_read: False replaces
        what is there."""
        self._folder, self._facts, self._is_read = folder, facts, is_read

    def about(self, *kept: str, **facts: object) -> Memory:
        """The same folder for an outcome that depends on the facts named in `kept` and on `facts`."""
        about = {name: self._facts[name] for name in kept if name in self._facts} | facts
        return Memory(self._folder, about, is_read=self._is_read)

    def recall(self, ways: Sequence[str]) -> dict[str, dict[str, float]] | None:
        """What was measured of exactly these ways, or None."""
        if self._folder is None or not self._is_read:
            return None
        try:
            times = json.loads(self._file(ways).read_text(encoding="utf-8"))["times"]
            is_whole = bool(times) and all(
                list(of_case) == list(ways) and all(isinstance(ms, float) and ms > 0 for ms in of_case.values())
                for of_case in times.values()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return times if is_whole else None

    def keep(self, ways: Sequence[str], times: Mapping[str, Mapping[str, float]]) -> None:
        """Writes an outcome; a folder that cannot be written costs the next start its measuring, nothing else."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False, encoding="utf-8") as part:
                json.dump({"facts": self._facts, "times": times}, part, indent=1)
            os.replace(part.name, self._file(ways))
        except OSError as error:
            log.info("what was measured cannot be kept in %s: %s", self._folder, error)

    def _file(self, ways: Sequence[str]) -> Path:
        text = json.dumps([self._facts, list(ways)], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _shapes(attention: AttentionBackend) -> dict[str, tuple[int, int]]:
    """The cases that the cache has room for."""
    size = attention.block_size
    return {
        case: (sequences, tokens)
        for case, (sequences, tokens) in CASES.items()
        if sequences * -(-tokens // size) <= attention.num_blocks
    }


@torch.inference_mode()
def _run(program: ForwardProgram, attention: AttentionBackend, shape: tuple[int, int]) -> None:
    batch = dummy_batch(*shape, attention.block_size)
    program(build_inputs(batch, attention.block_size, torch.device("cpu")))


def _count(threads: int) -> str:
    return f"{threads} thread{'s' if threads != 1 else ''}"


def _note(times: Mapping[str, Mapping[str, float]], best: str, source: str) -> str:
    def listed(way: str) -> str:
        return " / ".join(f"{of_case[way]:.3g}" for of_case in times.values())

    others = "; ".join(f"{way} {listed(way)}" for way in next(iter(times.values())) if way != best)
    return f"{best}, {source}: {listed(best)} ms at {', '.join(times)}; {others}"
