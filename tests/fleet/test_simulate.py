"""Replays on plans of described chips: what comes out follows from the cost model, or from counting by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mxn.config.datasets import Ask
from mxn.config.deployments import load_deployments
from mxn.errors import ConfigError
from mxn.fleet.calibration.store import MeasurementStore
from mxn.fleet.plan import Solved, solve_plan
from mxn.fleet.simulate import simulate

NAME = "llama-3.1-8b-instruct"


def _solved(folder: Path, *, rate: float = 1.0, chips: int = 1, extra: str = "", slo: str = "{}") -> Solved:
    path = folder / "mxn.yaml"
    path.write_text(
        f"cluster: {{nodes: [{{name: nv, chips: {{h100-sxm: {chips}}}}}]}}\n"
        f"deployments: [{{model: {NAME}, quantisations: [bf16], context_length: 8192, slo: {slo}, load: "
        f"{{requests_per_s: {rate}, prompt_tokens: 1000, output_tokens: 100}}}}{extra}]\n"
        "policy: {objective: goodput}\n"
    )
    return solve_plan(load_deployments(path), store=MeasurementStore(folder / "none.sqlite"))


def _asks(count: int, every_s: float, prompt: int = 1000, output: int = 100) -> list[Ask]:
    return [Ask(prompt_tokens=prompt, output_tokens=output, at_s=i * every_s) for i in range(count)]


def test_a_request_alone_takes_what_the_cost_model_says(tmp_path: Path) -> None:
    solved = _solved(tmp_path)
    (name,) = solved.replicas[NAME]
    candidate = solved.posed.options[NAME][name]
    times, shape = candidate.engine.times, candidate.shape
    found = simulate(solved, {"": _asks(20, 60.0)})
    one = found.deployments[0]
    assert one.served == 20
    chunks = shape.prefill(1000, step_tokens=512)
    assert one.ttft_p50_s == pytest.approx(times.prefill.seconds(chunks), rel=0.01)
    assert one.tpot_p50_s == pytest.approx(times.decode.seconds(shape.decode(1, 1050)), rel=0.01)
    assert one.output_tokens == 2000


def test_steps_taken_together_give_what_steps_one_by_one_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = _solved(tmp_path, rate=4.0)
    asks = [Ask(prompt_tokens=200 + 37 * i % 900, output_tokens=1 + 53 * i % 200, at_s=0.21 * i) for i in range(300)]
    together = simulate(solved, {"": asks})
    monkeypatch.setattr("mxn.fleet.simulate._Replica._decode_together", lambda self, until_s: False)
    alone = simulate(solved, {"": asks})
    assert alone.deployments[0].output_tokens == together.deployments[0].output_tokens
    for name in ("ttft_p50_s", "ttft_p95_s", "tpot_p50_s", "tpot_p95_s", "utilisation"):
        assert getattr(together.deployments[0], name) == pytest.approx(getattr(alone.deployments[0], name), rel=0.02)
    assert together.joules == pytest.approx(alone.joules, rel=0.01)


def test_the_same_seed_gives_the_same_answer_and_another_deals_otherwise(tmp_path: Path) -> None:
    extra = f", {{name: second, model: {NAME}, context_length: 8192, load: {{requests_per_s: 1, prompt_tokens: 10, "
    extra += "output_tokens: 10}}"
    solved = _solved(tmp_path, chips=2, extra=extra)
    asks = _asks(200, 0.5)
    first, again, other = (simulate(solved, {"": asks}, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.deployments != replace(other, seed=1).deployments
    assert sum(one.requests for one in first.deployments) == 200
    assert min(one.requests for one in first.deployments) > 60


def test_more_load_than_a_replica_serves_is_late_and_never_lost(tmp_path: Path) -> None:
    solved = _solved(tmp_path, slo="{ttft_ms: 500, tpot_ms: 50}")
    calm = simulate(solved, {"": _asks(200, 2.0)}).deployments[0]
    crowded = simulate(solved, {"": _asks(200, 2.0)}, rate_scale=200.0).deployments[0]
    assert calm.slo_attained == 1.0
    assert crowded.slo_attained is not None
    assert crowded.slo_attained < 0.5
    assert crowded.served == calm.served == 200
    assert (crowded.ttft_p99_s or 0) > (calm.ttft_p99_s or 0)


def test_too_long_requests_are_refused_and_count_against_the_slo(tmp_path: Path) -> None:
    solved = _solved(tmp_path, slo="{ttft_ms: 5000}")
    asks = [*_asks(9, 10.0), Ask(prompt_tokens=9000, output_tokens=1, at_s=95.0)]
    one = simulate(solved, {NAME: asks}).deployments[0]
    assert (one.requests, one.served, one.refused, one.lost) == (10, 9, 1, 0)
    assert one.slo_attained == pytest.approx(0.9)


def test_a_deployment_without_replicas_loses_its_requests(tmp_path: Path) -> None:
    extra = ", {name: large, model: deepseek-v3, context_length: 4096, load: {requests_per_s: 1, prompt_tokens: 10, "
    extra += "output_tokens: 10}}"
    one = simulate(_solved(tmp_path, extra=extra), {"large": _asks(5, 1.0, 10, 10)}).deployments[1]
    assert (one.requests, one.served, one.lost, one.slo_attained) == (5, 0, 5, None)


def test_prompts_that_begin_alike_are_cached(tmp_path: Path) -> None:
    solved = _solved(tmp_path)
    shared = [Ask(prompt_tokens=1100, output_tokens=2, at_s=10.0 * i, block_ids=(1, 2)) for i in range(50)]
    own = [replace(ask, block_ids=(100 + 2 * i, 101 + 2 * i)) for i, ask in enumerate(shared)]
    cached, fresh = (simulate(solved, {"": asks}).deployments[0] for asks in (shared, own))
    assert (cached.ttft_p50_s or 1) < 0.5 * (fresh.ttft_p50_s or 0)


def test_traces_that_cannot_be_replayed_are_refused(tmp_path: Path) -> None:
    solved = _solved(tmp_path)
    with pytest.raises(ConfigError, match='no deployment is called "other"'):
        simulate(solved, {"other": _asks(1, 1.0)})
    with pytest.raises(ConfigError, match="arrival times"):
        simulate(solved, {"": [Ask(text="hello")]})
    with pytest.raises(ConfigError, match="no request of the trace"):
        simulate(solved, {"": [Ask(prompt_tokens=1, output_tokens=1, at_s=100.0)]}, limit_s=1.0)
