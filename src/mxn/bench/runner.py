"""Runs workloads against arms, arms taking turns, and turns what happened into records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mxn.bench.arms import Arm
from mxn.bench.client import RequestResult
from mxn.bench.metrics import Spread, metrics
from mxn.bench.records import Record
from mxn.bench.workloads import PromptMaker, Workload
from mxn.core.quantity import Quantity
from mxn.energy.window import EnergyWindow, WindowEnergy
from mxn.errors import MxnError

Progress = Callable[[str, int, int], None]
"""Called with (what runs now, parts done, parts in all)."""

_WARM_UP = Workload(
    name="warm-up",
    title="warm-up",
    num_requests=2,
    prompt_tokens=64,
    output_tokens=8,
    concurrency=2,
    headline="duration_s",
)


class BenchError(MxnError):
    """A subject answers nothing, so there is nothing to measure."""


@dataclass(slots=True)
class _Collected:
    """What one arm did on one workload so far."""

    figures: list[dict[str, float]] = field(default_factory=list)
    energy: list[WindowEnergy] = field(default_factory=list)
    results: list[RequestResult] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


async def measure(
    arms: Sequence[Arm],
    workloads: Sequence[Workload],
    prompts: PromptMaker,
    *,
    repetitions: int,
    budget_s: float = math.inf,
    progress: Progress = lambda what, done, total: None,
) -> list[Record]:
    """Every workload on every arm, `repetitions` times, arms in rotating order within each repetition.

    All arms get the same prompts in a repetition, and each repetition gets new ones.
    budget_s: no repetition begins that would, at the pace so far, end later than this; one always runs.
    Raises: BenchError when an arm answers nothing.
    """
    collected = {(arm.subject.label, w.name): _Collected() for arm in arms for w in workloads}
    total = len(collected) * repetitions
    done = 0
    for arm in arms:
        progress(f"{arm.subject.label}: warm-up", done, total)
        texts = prompts.make(_WARM_UP)
        results = await arm.run(texts, _WARM_UP.output_tokens, _WARM_UP.concurrency)
        if all(r.error for r in results):
            raise BenchError(f"{arm.subject.label} cannot be measured: {results[0].error}")
    started_s = time.monotonic()
    for repetition in range(repetitions):
        if repetition and (time.monotonic() - started_s) * (repetition + 1) / repetition > budget_s:
            break
        for workload in workloads:
            texts = prompts.make(workload)
            turn = repetition % len(arms)
            for arm in (*arms[turn:], *arms[:turn]):
                progress(f"{arm.subject.label}: {workload.name}, {repetition + 1} of {repetitions}", done, total)
                await _run_once(arm, workload, texts, collected[arm.subject.label, workload.name])
                done += 1
    progress("done", done, total)
    return [_record(arm, w, collected[arm.subject.label, w.name]) for w in workloads for arm in arms]


async def _run_once(arm: Arm, workload: Workload, texts: Sequence[str], into: _Collected) -> None:
    window, cpu_s = EnergyWindow(arm.readers), time.process_time()
    results = await arm.run(texts, workload.output_tokens, workload.concurrency)
    into.energy.append(window.end())
    client_cpu_s = time.process_time() - cpu_s if arm.subject.interface == "HTTP" else None
    into.figures.append(metrics(results, client_cpu_s))
    into.results += results
    into.faults += _faults(results, workload)


def _faults(results: Sequence[RequestResult], workload: Workload) -> list[str]:
    """What went otherwise than asked; each kind once."""
    found: dict[str, int] = {}
    for result in results:
        if result.error is not None:
            fault = result.error
        elif result.num_output_tokens != workload.output_tokens:
            fault = f"{result.num_output_tokens} output tokens, expected {workload.output_tokens}"
        elif result.num_prompt_tokens not in (None, workload.prompt_tokens):
            fault = f"the server counts {result.num_prompt_tokens} prompt tokens, expected {workload.prompt_tokens}"
        else:
            continue
        found[fault] = found.get(fault, 0) + 1
    return [f"{count} of {len(results)} requests: {fault}" for fault, count in found.items()]


def _record(arm: Arm, workload: Workload, collected: _Collected) -> Record:
    good = [r for r in collected.results if r.error is None]
    num_output = sum(r.num_output_tokens for r in good)
    num_prompt = sum(r.num_prompt_tokens or workload.prompt_tokens for r in good)
    cached = [r.num_cached_tokens for r in good if r.num_cached_tokens is not None]
    names = {name for figures in collected.figures for name in figures}
    energy = combine(collected.energy)
    return Record(
        subject=arm.subject,
        workload=workload,
        metrics={n: Spread.of([f[n] for f in collected.figures if n in f]) for n in sorted(names)},
        values=tuple(f[workload.headline] for f in collected.figures if workload.headline in f),
        num_output_tokens=num_output,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=sum(cached) if cached else None,
        energy_j=energy.energy_j,
        mean_watts=energy.mean_watts,
        tokens_per_watt=energy.tokens_per_watt(num_output),
        total_tokens_per_watt=energy.tokens_per_watt(num_output + num_prompt),
        faults=tuple(dict.fromkeys(collected.faults)),
    )


def combine(windows: Sequence[WindowEnergy]) -> WindowEnergy:
    """Several stretches of time over the same readers as one; unavailable as soon as one of them is."""
    seconds = sum(w.seconds for w in windows)
    lost = next((w for w in windows if w.energy_j.value is None), None)
    if lost is not None or seconds == 0:
        reason = lost.energy_j.source if lost is not None else "nothing was measured"
        return WindowEnergy(
            seconds=seconds,
            energy_j=Quantity.unavailable("J", reason),
            mean_watts=Quantity.unavailable("W", reason),
            edge_error=float("inf"),
        )
    joules = sum(w.energy_j.value or 0.0 for w in windows)
    first = windows[0].energy_j
    errors = [w.energy_j.relative_error for w in windows if w.energy_j.relative_error is not None]

    def quantity(value: float, unit: str) -> Quantity:
        return Quantity(
            value=value,
            unit=unit,
            provenance=first.provenance,
            source=first.source,
            relative_error=max(errors) if errors else None,
        )

    return WindowEnergy(
        seconds=seconds,
        energy_j=quantity(joules, "J"),
        mean_watts=quantity(joules / seconds, "W"),
        edge_error=max(w.edge_error for w in windows),
    )
