from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mxn.core.chip import Chip
from mxn.fleet.calibration.fitting import Calibrated, Calibration, StepTimes, fitted_costs
from mxn.fleet.calibration.profile import Profile
from mxn.fleet.work import Costs, Shape, Work

CHIP = Chip(uid="cpu-0", kind=None, name="Made-up Chip", vendor="v", memory_bytes=1, cores=2)
VERSIONS = {"mxn": "1", "torch": "2"}


def _find(
    synthetic: Any, profiles: list[Profile], model: str, *, chip: Chip = CHIP, is_here: bool = True
) -> Calibrated | None:
    return Calibration(profiles).find(
        synthetic.spec(model), chip=chip, is_here=is_here, backend="cpu", versions=VERSIONS, quantisation="int8"
    )


def test_points_that_were_not_measured_are_predicted(synthetic: Any) -> None:
    profile = synthetic.profile()
    prefill, decode = fitted_costs([profile])
    for batch, context in ((4, 128), (16, 1024), (32, 2000)):
        work = profile.shape.decode(batch, context)
        assert decode.seconds(work) == pytest.approx(synthetic.truth.seconds(work), rel=1e-6)
    work = profile.shape.prefill(1024, step_tokens=512)
    assert prefill.seconds(work) == pytest.approx(synthetic.truth.seconds(work), rel=1e-6)


def test_what_a_fit_gets_wrong_is_its_margin(synthetic: Any) -> None:
    exact = _find(synthetic, [synthetic.profile()], "smollm2-135m-instruct")
    noisy = _find(synthetic, [synthetic.profile(off=(0.1, -0.1, 0.0))], "smollm2-135m-instruct")
    assert exact is not None
    assert noisy is not None
    assert exact.times.decode_margin < 0.001
    assert 0.05 < noisy.times.decode_margin < 0.4
    assert exact.times.kind == "measured"


def test_another_model_is_scaled_from_those_that_were_measured(synthetic: Any) -> None:
    names = ("smollm2-135m-instruct", "qwen3-0.6b", "llama-3.2-1b-instruct")
    found = _find(synthetic, [synthetic.profile(name) for name in names], "llama-3.2-3b-instruct")
    assert found is not None
    assert found.times.kind == "scaled"
    assert all(name in found.times.source for name in names)
    spec = synthetic.spec("llama-3.2-3b-instruct")
    work = Shape(spec=spec, weight_bytes=float(spec.num_parameters or 0), kv_bytes_per_token=4000.0).decode(8, 500)
    assert found.times.decode.seconds(work) == pytest.approx(synthetic.truth.seconds(work), rel=0.02)


def test_scaling_from_one_model_alone_has_a_wide_margin(synthetic: Any) -> None:
    found = _find(synthetic, [synthetic.profile()], "qwen3-0.6b")
    mine = _find(synthetic, [synthetic.profile()], "smollm2-135m-instruct")
    assert found is not None
    assert mine is not None
    assert found.times.decode_margin >= 0.5 > mine.times.decode_margin


def test_a_profile_speaks_for_no_other_chip_backend_or_format(synthetic: Any) -> None:
    profile = synthetic.profile()
    assert _find(synthetic, [profile], "smollm2-135m-instruct", chip=replace(CHIP, name="Other")) is None
    assert _find(synthetic, [profile], "smollm2-135m-instruct", chip=replace(CHIP, cores=4)) is None
    assert _find(synthetic, [replace(profile, backend="onnx")], "smollm2-135m-instruct") is None
    assert _find(synthetic, [replace(profile, quantisation="fp32")], "smollm2-135m-instruct") is None


def test_a_described_gpu_takes_profiles_of_its_kind_and_a_described_cpu_takes_none(synthetic: Any) -> None:
    profile = replace(synthetic.profile(), chip_kind="x1")
    gpu = Chip(uid="described-x1", kind="x1", name="X1", vendor="v", memory_bytes=1, cores=1)
    assert _find(synthetic, [profile], "smollm2-135m-instruct", chip=gpu, is_here=False) is not None
    cpu = replace(gpu, uid="cpu-described")
    assert _find(synthetic, [profile], "smollm2-135m-instruct", chip=cpu, is_here=False) is None


def test_profiles_with_the_installed_versions_count_alone_and_others_cost_a_margin(synthetic: Any) -> None:
    old = synthetic.faster(synthetic.profile(), 2.0, versions={"mxn": "0"}, measured_at="2027-01-01T00:00:00+00:00")
    both = _find(synthetic, [old, synthetic.profile()], "smollm2-135m-instruct")
    only_old = _find(synthetic, [old], "smollm2-135m-instruct")
    assert both is not None
    assert only_old is not None
    assert only_old.times.decode_margin >= both.times.decode_margin + 0.1
    assert "other versions" in only_old.times.source
    work = synthetic.profile().shape.decode(1, 64)
    assert both.times.decode.seconds(work) == pytest.approx(2 * only_old.times.decode.seconds(work), rel=1e-4)


def test_a_mixed_step_pays_for_weights_and_its_fixed_part_once() -> None:
    costs = Costs(weight_bytes=1.0, linear_flops=1.0, steps=10.0)
    times = StepTimes(prefill=costs, decode=costs, kind="measured", source="")
    chunk, tokens = Work(weight_bytes=5, linear_flops=3, steps=1), Work(weight_bytes=5, linear_flops=2, steps=1)
    assert times.step_s(chunk, tokens) == 10 + 5 + 3 + 2
    assert times.step_s(chunk, Work()) == 18
    assert times.step_s(Work(), tokens) == 17
