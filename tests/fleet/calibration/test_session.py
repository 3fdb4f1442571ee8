"""Measuring replicas of the fake backend, whose step takes a set time, so that the figures are known beforehand."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mxn.backends.fake import FAKE_W
from mxn.backends.registry import load_backend
from mxn.core.model import Model, ModelSpec
from mxn.engine.messages import Load
from mxn.errors import BackendError
from mxn.fleet.calibration import measure
from mxn.fleet.calibration.measure import CALIBRATION, measure_cell
from mxn.fleet.calibration.profile import Profile
from mxn.fleet.calibration.session import calibrate_cells
from mxn.fleet.launchers.local import LocalLauncher

SPEC = ModelSpec(
    architecture="fake",
    num_layers=2,
    hidden_size=8,
    vocab_size=1000,
    num_heads=2,
    num_kv_heads=1,
    key_dim=4,
    value_dim=4,
    max_context=700,
    num_parameters=10_000,
)
MODEL = Model(name="tiny", folder="/nowhere", revision="r", spec=SPEC)


def _profile(step_ms: float, token_us: float, *, kv_bytes: int = 1 << 20, budget_s: float = 0.1) -> Profile:
    backend = load_backend("fake")
    chip = backend.chips()[0]
    options = (("step_ms", str(step_ms)), ("token_us", str(token_us)))
    settings = replace(CALIBRATION, kv_bytes=kv_bytes, options=options)

    async def run() -> Profile:
        load = Load(backend="fake", model=MODEL, settings=settings, chips=[chip], max_waiting=64)
        replica = await LocalLauncher().start(load, lambda phase, fraction: None, {})
        try:
            return await measure_cell(
                replica, backend=backend, chip=chip, model=MODEL, settings=settings, budget_s=budget_s
            )
        finally:
            await replica.kill()

    return asyncio.run(run())


def test_a_profile_shows_the_time_that_steps_were_made_to_take() -> None:
    profile = _profile(step_ms=10, token_us=100)
    points = {(point.batch, round(point.context, -2)): point for point in profile.decode}
    assert {batch for batch, _ in points} == {1, 2, 8, 16}
    for (batch, _), point in points.items():
        # Sleeps last longer than asked, never less; the machine may be busy.
        assert 0.99 * (0.010 + batch * 100e-6) < point.median_s < 2 * (0.010 + batch * 100e-6)
        assert point.repetitions >= measure.GAPS
    assert [point.tokens for point in profile.prefill] == [16, 64, 192, 384]
    longest = profile.prefill[-1]
    assert 0.99 * (0.010 + 384 * 100e-6) < longest.median_s < 2 * (0.010 + 384 * 100e-6)
    assert profile.power.idle_w == pytest.approx(FAKE_W)
    assert profile.power.busy_w == pytest.approx(FAKE_W)


def test_a_small_cache_leaves_out_what_it_has_no_room_for() -> None:
    profile = _profile(step_ms=1, token_us=0, kv_bytes=4 * 1200)
    assert max(point.batch for point in profile.decode if point.context < 200) == 2
    assert [point.batch for point in profile.decode if point.context > 300] == [1, 2]


def test_cells_that_cannot_be_loaded_are_told_and_left_out() -> None:
    lines: list[str] = []
    assert calibrate_cells([replace(MODEL, folder="/nowhere")], backends=["cpu"], on_line=lines.append) == []
    assert any("left out" in line for line in lines)


def test_a_backend_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BackendError, match="is not installed"):
        calibrate_cells([MODEL], backends=["nothing"])
