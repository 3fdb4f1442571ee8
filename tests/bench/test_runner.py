import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mxn.bench import records, report
from mxn.bench.client import RequestResult
from mxn.bench.environment import manifest
from mxn.bench.records import Report, Subject
from mxn.bench.runner import BenchError, measure
from mxn.bench.workloads import PromptMaker, parse_workloads
from mxn.core.clock import FakeClock
from mxn.core.quantity import Provenance
from mxn.energy.reader import NullReader, PowerReader
from mxn.energy.replay import ConstantReader, ReplayReader
from mxn.errors import ConfigError


class ScriptedArm:
    """An arm of known speed and power that remembers what it was asked."""

    def __init__(self, label: str, log: list[tuple[str, str]], *, token_s: float = 0.01, short_by: int = 0) -> None:
        self.subject = Subject(label=label, model="m", interface="HTTP", backend=label, quantisation="int8")
        self.clock = FakeClock()
        trace: list[tuple[float, float | None]] = [(t / 100, t / 100 * 20.0) for t in range(40_000)]
        self.readers: tuple[PowerReader, ...] = (ReplayReader(trace, clock=self.clock),)
        self.log, self.token_s, self.short_by, self.error = log, token_s, short_by, None
        self.token_times_s: list[float] = []  # of the first runs, before token_s holds

    async def run(self, prompts: list[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        self.log.append((self.subject.label, prompts[0]))
        await asyncio.sleep(0)
        token_s = self.token_times_s.pop(0) if self.token_times_s else self.token_s
        start_s, seconds = time.monotonic(), token_s * max_tokens
        self.clock.advance(seconds)
        times_s = tuple(start_s + token_s * (i + 1) for i in range(max_tokens))
        return [
            RequestResult(
                start_s=start_s,
                end_s=times_s[-1],
                chunk_times_s=times_s,
                num_output_tokens=max_tokens - self.short_by,
                num_prompt_tokens=len(prompt.split()),
                error=self.error,
            )
            for prompt in prompts
        ]

    def close(self) -> None: ...


@pytest.fixture
def prompts(tmp_path: Path, write_word_tokenizer: Callable[..., Path]) -> PromptMaker:
    return PromptMaker(write_word_tokenizer(tmp_path), seed=0)


async def test_known_speed_and_power_come_out_exactly(prompts: PromptMaker) -> None:
    arm = ScriptedArm("a", [])
    one, batch = await measure([arm], parse_workloads("quick"), prompts, repetitions=3)
    assert one.headline is not None
    assert one.headline.median == pytest.approx(100, rel=0.005)
    assert one.mean_watts.value == pytest.approx(20, rel=0.005)
    assert one.tokens_per_watt.value == pytest.approx(100 / 20, rel=0.005)
    assert one.total_tokens_per_watt.value == pytest.approx(200 / 20, rel=0.005)
    assert one.tokens_per_watt.provenance is Provenance.SIMULATED
    assert one.num_output_tokens == 3 * 64
    assert batch.tokens_per_watt.value == pytest.approx(1600 / 20, rel=0.02)
    assert one.faults == ()


@pytest.mark.parametrize(("times_s", "rounds", "is_warned"), [((3, 2, 1, 1), 4, False), ((1, 2, 1, 2, 1, 2), 6, True)])
async def test_warm_up_goes_on_until_two_rounds_are_alike(
    prompts: PromptMaker, times_s: tuple[float, ...], rounds: int, is_warned: bool
) -> None:
    log: list[tuple[str, str]] = []
    arm = ScriptedArm("a", log)
    arm.token_times_s = list(times_s)
    (found,) = await measure([arm], parse_workloads("W1"), prompts, repetitions=1)
    assert len(log) == rounds + 1
    assert any("not steady" in text for text in found.warnings) is is_warned


async def test_arms_take_turns_and_share_prompts(prompts: PromptMaker) -> None:
    log: list[tuple[str, str]] = []
    arms = [ScriptedArm("a", log), ScriptedArm("b", log)]
    await measure(arms, parse_workloads("quick1"), prompts, repetitions=4)
    runs = log[4:]  # two rounds of warm-up each
    assert [label for label, _ in runs] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    for i in range(0, 8, 2):
        assert runs[i][1] == runs[i + 1][1]
    assert len({prompt for _, prompt in runs}) == 4


async def test_no_repetition_begins_that_would_overrun_the_budget(prompts: PromptMaker) -> None:
    log: list[tuple[str, str]] = []
    (record,) = await measure([ScriptedArm("a", log)], parse_workloads("quick1"), prompts, repetitions=5, budget_s=0.0)
    assert len(record.values) == 1
    assert len(log) == 3


async def test_wrong_token_count_is_a_fault_and_shown(prompts: PromptMaker) -> None:
    (record,) = await measure([ScriptedArm("a", [], short_by=1)], parse_workloads("quick1"), prompts, repetitions=2)
    assert record.faults == ("1 of 1 requests: 63 output tokens, expected 64",)
    assert "FAULT" in report.to_markdown(report.matrix([record]))


async def test_arm_that_answers_nothing_ends_the_run_with_the_reason(prompts: PromptMaker) -> None:
    arm = ScriptedArm("a", [])
    arm.error = "cannot connect"
    with pytest.raises(BenchError, match="a cannot be measured: cannot connect"):
        await measure([arm], parse_workloads("quick1"), prompts, repetitions=1)


async def test_missing_meter_stays_unavailable_in_record_json_and_tables(prompts: PromptMaker, tmp_path: Path) -> None:
    arm = ScriptedArm("a", [])
    arm.readers = (NullReader("no counter here"),)
    found = await measure([arm], parse_workloads("quick"), prompts, repetitions=1)
    assert found[0].tokens_per_watt.value is None
    text = report.to_markdown(report.matrix(found))
    assert "| - | - | unavailable |" in text
    assert "no counter here" in text
    path = tmp_path / "out" / "r.json"
    saved = Report(manifest=manifest(seed=0), records=tuple(found))
    records.save(saved, path)
    assert records.load(path) == saved


def test_damaged_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"schema_version": 1}')
    with pytest.raises(ConfigError, match="not a benchmark report"):
        records.load(path)


async def test_comparison_shows_the_ratio_in_the_direction_of_better(prompts: PromptMaker) -> None:
    arms = [ScriptedArm("slow", [], token_s=0.02), ScriptedArm("fast", [], token_s=0.01)]
    found = await measure(arms, parse_workloads("quick1,W4"), prompts, repetitions=2)
    rows = report.comparison(found).rows
    assert [(row[2], row[4][:5]) for row in rows] == [("slow", "-"), ("fast", "x2.00")] * 2
    assert "| quick1 |" in report.report_markdown(Report(manifest=manifest(seed=0), records=tuple(found)))


async def test_meter_that_vanishes_in_one_repetition_leaves_no_figure_of_energy(prompts: PromptMaker) -> None:
    arm = ScriptedArm("a", [])
    trace: list[tuple[float, float | None]] = [(t / 100, t / 100 * 20.0 if t < 150 else None) for t in range(4000)]
    arm.readers = (ReplayReader(trace, clock=arm.clock),)
    (record,) = await measure([arm], parse_workloads("quick1"), prompts, repetitions=4)
    assert [run.energy_j is None for run in record.runs] == [False, False, True, True]
    assert record.tokens_per_watt.value is None
    assert "the counter is gone" in record.energy_j.source
    assert record.sources[0].loss == "gone"
    assert record.headline is not None
    assert record.headline.n == 4, "the speed is known all the same"


async def test_server_that_dies_mid_run_is_a_fault_with_its_kind(prompts: PromptMaker) -> None:
    arm = ScriptedArm("a", [])
    run_well = arm.run

    async def run(texts: list[str], max_tokens: int, concurrency: int) -> list[RequestResult]:
        results = await run_well(texts, max_tokens, concurrency)
        if len(arm.log) < 4:  # two rounds of warm-up and one repetition
            return results
        return [replace(r, error="connection reset", error_kind="connection") for r in results]

    arm.run = run  # type: ignore[method-assign]
    (record,) = await measure([arm], parse_workloads("quick8"), prompts, repetitions=3)
    assert record.errors == {"connection": 32}
    assert record.faults == ("16 of 16 requests: connection reset",)
    assert not record.is_result
    assert record.num_output_tokens == 16 * 32


async def test_idle_power_is_watched_before_and_after(prompts: PromptMaker) -> None:
    arm = ScriptedArm("a", [])
    arm.readers = (ConstantReader(7.0, detail=""),)
    (record,) = await measure([arm], parse_workloads("quick1"), prompts, repetitions=1, idle_s=0.05)
    assert record.idle_before_w is not None
    assert record.idle_before_w.value == pytest.approx(7)
    assert record.idle_after_w is not None
    assert record.idle_after_w.value == pytest.approx(7)
