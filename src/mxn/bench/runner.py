"""Runs workloads against arms, arms taking turns, and turns what happened into records."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mxn.bench.arms import Arm, LoadArm
from mxn.bench.client import RequestResult
from mxn.bench.load import Session, plan
from mxn.bench.metrics import (
    Slo,
    Spread,
    drift_warning,
    error_counts,
    metrics,
    output_tokens_within,
    percentile,
    steady_window,
    window_metrics,
)
from mxn.bench.queue import QueueArm
from mxn.bench.records import NO_STEADY_PART, Record, Run
from mxn.bench.workloads import Api, PromptMaker, Workload, over_chat
from mxn.config.datasets import Dataset
from mxn.core.quantity import Quantity
from mxn.energy.timeline import EnergyTimeline
from mxn.energy.window import EnergyWindow, WindowEnergy, combine
from mxn.errors import ConfigError, MxnError

Progress = Callable[[str, int, int], None]
"""Called with (what runs now, parts done, parts in all)."""

BUSY_CLIENT = 0.8
LATE_MS = 10.0
"""A generator that takes this share of a core, or sends or reads this late, limits what it measures."""

WARM_UP_CHANGE = 0.15
MAX_WARM_UPS = 6
"""An arm is warm when two rounds in a row differ by at most this share, or after so many."""

_MAX_POWER_POINTS = 600
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

    runs: list[Run] = field(default_factory=list)
    energy: list[WindowEnergy] = field(default_factory=list)
    steady_energy: list[WindowEnergy] = field(default_factory=list)
    steady_tokens: float = 0.0
    results: list[RequestResult] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    power: tuple[tuple[float, float | None], ...] = ()


async def measure(
    arms: Sequence[Arm],
    workloads: Sequence[Workload],
    prompts: PromptMaker,
    *,
    repetitions: int,
    budget_s: float = math.inf,
    idle_s: float = 0.0,
    slo: Slo | None = None,
    dataset: Dataset | None = None,
    seed: int = 0,
    price_per_hour: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Record]:
    """Every workload on every arm, `repetitions` times, arms in rotating order within each repetition.

    All arms get the same prompts in a repetition, and each repetition gets new ones (unless a dataset names them).
    budget_s: no repetition begins that would, at the pace so far, end later than this; one always runs.
    idle_s: how long idle power is watched before and after.
    Raises: BenchError when an arm answers nothing.
    """
    collected = {(arm.subject.label, w.name): _Collected() for arm in arms for w in workloads}
    total = len(collected) * repetitions
    done = 0
    unsettled = {}
    for arm in arms:
        progress(f"{arm.subject.label}: warm-up", done, total)
        unsettled[arm.subject.label] = await _warm_up(arm, prompts, workloads[0].api)
    idle_before = await _idle_watts(arms, idle_s)
    started_s = time.monotonic()
    for repetition in range(repetitions):
        if repetition and (time.monotonic() - started_s) * (repetition + 1) / repetition > budget_s:
            break
        for workload in workloads:
            sessions = plan(workload, prompts, seed=seed + repetition, dataset=dataset)
            turn = repetition % len(arms)
            for arm in (*arms[turn:], *arms[:turn]):
                progress(f"{arm.subject.label}: {workload.name}, {repetition + 1} of {repetitions}", done, total)
                await _run_once(arm, workload, sessions, collected[arm.subject.label, workload.name], slo)
                done += 1
    idle_after = await _idle_watts(arms, idle_s)
    progress("done", done, total)
    losses = list(dataset.losses) if dataset is not None else []
    return [
        _record(
            arm,
            workload,
            collected[arm.subject.label, workload.name],
            idle=(idle_before[i], idle_after[i]),
            notes=[*losses, *unsettled[arm.subject.label]],
            price_per_hour=price_per_hour,
        )
        for workload in workloads
        for i, arm in enumerate(arms)
    ]


async def _warm_up(arm: Arm, prompts: PromptMaker, api: Api) -> tuple[str, ...]:
    """Rounds of the warm-up until two in a row take the same time. Returns: a warning when they never do.

    Raises: BenchError when the arm answers nothing.
    """
    last_s = 0.0
    for _ in range(MAX_WARM_UPS):
        if api == "chat" and isinstance(arm, LoadArm):
            load = await arm.drive(plan(over_chat(_WARM_UP), prompts, seed=0), _WARM_UP.concurrency)
            results = load.results
        else:
            results = await arm.run(prompts.make(_WARM_UP), _WARM_UP.output_tokens, _WARM_UP.concurrency)
        took_s = max(r.end_s for r in results) - min(r.start_s for r in results)
        if all(r.error for r in results):
            raise BenchError(f"{arm.subject.label} cannot be measured: {results[0].error}")
        if abs(took_s - last_s) <= WARM_UP_CHANGE * last_s:
            return ()
        last_s = took_s
    return (
        f"still not steady after {MAX_WARM_UPS} rounds of warm-up: the last two differed by over {WARM_UP_CHANGE:.0%}",
    )


async def _idle_watts(arms: Sequence[Arm], seconds: float) -> list[Quantity | None]:
    """Mean watts of each arm's chips while nothing is asked of any."""
    if not seconds:
        return [None] * len(arms)
    windows = [EnergyWindow(arm.readers) for arm in arms]
    await asyncio.sleep(seconds)
    return [window.end().mean_watts for window in windows]


async def _run_once(
    arm: Arm, workload: Workload, sessions: Sequence[Session], into: _Collected, slo: Slo | None
) -> None:
    queue_before = await arm.queue() if isinstance(arm, QueueArm) else None
    window, timeline = EnergyWindow(arm.readers), EnergyTimeline(arm.readers)
    begin_s, cpu_s = time.monotonic(), time.process_time()
    lag_s: tuple[float, ...] = ()
    try:
        if isinstance(arm, LoadArm):
            load = await arm.drive(sessions, workload.concurrency)
            results, lag_s = load.results, load.lag_s
        else:
            results = await _run_plain(arm, workload, sessions)
        energy = window.end()
    finally:
        timeline.close()
    is_apart = arm.subject.interface == "HTTP"
    figures = metrics(results, time.process_time() - cpu_s if is_apart else None, slo)
    if lag_s:
        figures["client_lag_p99_ms"] = 1e3 * percentile(lag_s, 99)
    queue_after = await arm.queue() if isinstance(arm, QueueArm) else None
    if queue_before and queue_after and (mean_s := queue_before.mean_s_until(queue_after)) is not None:
        figures["queue_mean_ms"] = 1e3 * mean_s
    steady, note = _steady(results, workload, timeline, into, slo)
    output = sum(r.num_output_tokens for r in results if r.error is None)
    into.runs.append(
        Run(
            figures=figures,
            steady=steady,
            steady_note=note,
            energy_j=energy.energy_j.value,
            tokens_per_watt=energy.tokens_per_watt(output).value,
        )
    )
    into.energy.append(energy)
    into.results += results
    into.faults += _faults(results, workload)
    into.warnings += _client_limits(figures)
    watts = timeline.watts()
    step = max(1, -(-len(watts) // _MAX_POWER_POINTS))
    into.power = tuple((round(at_s - begin_s, 3), None if w is None else round(w, 3)) for at_s, w in watts[::step])


async def _run_plain(arm: Arm, workload: Workload, sessions: Sequence[Session]) -> list[RequestResult]:
    """For arms that only know closed loops of equal requests."""
    is_even = workload.turns == 1 and not workload.length_spread and workload.dataset == "synthetic"
    if workload.is_open or workload.api == "chat" or not is_even:
        raise ConfigError(
            f"{arm.subject.label} is driven in process and runs closed loops of equal completions only; "
            f"{workload.name} needs a server: leave out --in-process"
        )
    prompts = [session.turns[0].text for session in sessions]
    return await arm.run(prompts, workload.output_tokens, workload.concurrency)


def _steady(
    results: Sequence[RequestResult],
    workload: Workload,
    timeline: EnergyTimeline,
    into: _Collected,
    slo: Slo | None,
) -> tuple[dict[str, float], str]:
    """Figures of a run's steady part, or why it has none."""
    found = steady_window(results, is_open=workload.is_open)
    if isinstance(found, str):
        return {}, found
    begin_s, end_s = found
    figures = window_metrics(results, begin_s, end_s, slo)
    drift = drift_warning(results, begin_s, end_s)
    if drift:
        into.warnings.append(drift)
    into.steady_energy.append(timeline.between(begin_s, end_s))
    into.steady_tokens += sum(output_tokens_within(r, begin_s, end_s) for r in results)
    return figures, ""


def _client_limits(figures: dict[str, float]) -> list[str]:
    """What to say when the load generator itself was the limit."""
    found = []
    share = figures.get("client_cpu_share", 0.0)
    if share > BUSY_CLIENT:
        found.append(f"the load generator took {share:.0%} of a core: it may have been the limit")
    for name, what in (("lateness_p99_ms", "sent requests"), ("client_lag_p99_ms", "ran")):
        if figures.get(name, 0.0) > LATE_MS:
            found.append(f"the load generator {what} up to {figures[name]:.0f} ms late (p99): its own limit shows")
    return found


def _faults(results: Sequence[RequestResult], workload: Workload) -> list[str]:
    """What went otherwise than asked; each kind once."""
    found: dict[str, int] = {}
    for result in results:
        output = result.asked_output_tokens or workload.output_tokens
        is_varied = workload.turns > 1 or workload.length_spread or workload.dataset != "synthetic"
        is_varied = is_varied or workload.api == "chat"  # its template's tokens are the server's affair
        prompt = result.asked_prompt_tokens or (None if is_varied else workload.prompt_tokens)
        if result.error is not None:
            fault = result.error
        elif result.num_output_tokens != output:
            fault = f"{result.num_output_tokens} output tokens, expected {output}"
        elif prompt is not None and result.num_prompt_tokens not in (None, prompt):
            fault = f"the server counts {result.num_prompt_tokens} prompt tokens, expected {prompt}"
        else:
            continue
        found[fault] = found.get(fault, 0) + 1
    return [f"{count} of {len(results)} requests: {fault}" for fault, count in found.items()]


def _record(
    arm: Arm,
    workload: Workload,
    collected: _Collected,
    *,
    idle: tuple[Quantity | None, Quantity | None],
    notes: Sequence[str],
    price_per_hour: float | None,
) -> Record:
    good = [r for r in collected.results if r.error is None]
    num_output = sum(r.num_output_tokens for r in good)
    num_prompt = sum(r.num_prompt_tokens or r.asked_prompt_tokens or workload.prompt_tokens for r in good)
    cached = [r.num_cached_tokens for r in good if r.num_cached_tokens is not None]
    energy = combine(collected.energy)
    joules = energy.energy_j.value
    steady_energy = combine(collected.steady_energy) if collected.steady_energy else None
    steady_notes = [f"{NO_STEADY_PART}: {run.steady_note}" for run in collected.runs[:1] if run.steady_note]
    return Record(
        subject=arm.subject,
        workload=workload,
        metrics=_spreads([run.figures for run in collected.runs]),
        values=tuple(r.figures[workload.headline] for r in collected.runs if workload.headline in r.figures),
        num_output_tokens=num_output,
        num_prompt_tokens=num_prompt,
        num_cached_tokens=sum(cached) if cached else None,
        energy_j=energy.energy_j,
        mean_watts=energy.mean_watts,
        tokens_per_watt=energy.tokens_per_watt(num_output),
        total_tokens_per_watt=energy.tokens_per_watt(num_output + num_prompt),
        joules_per_output_token=joules / num_output if joules is not None and num_output else None,
        joules_per_token=joules / (num_output + num_prompt) if joules is not None and num_output else None,
        scope=energy.scope,
        sources=energy.sources,
        steady=_spreads([run.steady for run in collected.runs if run.steady]),
        steady_tokens_per_watt=steady_energy.tokens_per_watt(collected.steady_tokens) if steady_energy else None,
        steady_mean_watts=steady_energy.mean_watts if steady_energy else None,
        idle_before_w=idle[0],
        idle_after_w=idle[1],
        power=collected.power,
        runs=tuple(collected.runs),
        errors=error_counts(collected.results),
        warnings=tuple(dict.fromkeys((*notes, *collected.warnings, *steady_notes))),
        faults=tuple(dict.fromkeys(collected.faults)),
        price_per_hour=price_per_hour,
    )


def _spreads(runs: Sequence[dict[str, float]]) -> dict[str, Spread]:
    names = sorted({name for figures in runs for name in figures})
    return {name: Spread.of([figures[name] for figures in runs if name in figures]) for name in names}
