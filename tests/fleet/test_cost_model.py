from __future__ import annotations

from dataclasses import replace

import pytest

from mxn.config.chip_card import load_chip_cards
from mxn.config.cluster import BackendConfig
from mxn.config.demand import LengthConfig, SloConfig
from mxn.config.model_card import load_model_cards
from mxn.core.chip import Chip
from mxn.fleet.calibration.fitting import Calibrated, StepTimes
from mxn.fleet.calibration.profile import Power
from mxn.fleet.cost_model import (
    UNCALIBRATED_GPU,
    CostModel,
    Engine,
    Missed,
    Prediction,
    calibrated_engine,
    engine_of,
)
from mxn.fleet.fit import GIB, Fit, fit_model
from mxn.fleet.work import Costs, Shape

H100 = load_chip_cards()["h100-sxm"]
PARTS = (LengthConfig(share=1.0, prompt_tokens=1000, output_tokens=200),)


def _model(name: str = "llama-3.1-8b-instruct", *, chips: float = 1) -> tuple[CostModel, Fit, Engine]:
    card = load_model_cards()[name]
    spec = card.architecture.spec()
    assert spec is not None
    engine = engine_of(H100, "bf16", chips, spec.num_layers)
    assert isinstance(engine, Engine)
    fit = fit_model(
        card.architecture,
        spec,
        BackendConfig(name="own", chips=("h100-sxm",), quantisations=("bf16",), max_chips=8),
        Chip(uid="g", kind=None, name="g", vendor="v", memory_bytes=1, cores=1),
        quantisation="bf16",
        context=8192,
        sequences=1,
        memory_bytes=80 * GIB * min(1, chips),
        num_chips=max(1, int(chips)),
    )
    whole = max(1, int(chips))
    shape = Shape(
        spec=spec,
        weight_bytes=(fit.weights.value or 0) * whole,
        kv_bytes_per_token=fit.kv_bytes_per_token * whole,
    )
    return CostModel(shape, engine), fit, engine


def _predict(slo: SloConfig | None = None, **arguments: float) -> Prediction | Missed:
    model, fit, _ = _model(**arguments)
    return model.predict(PARTS, slo or SloConfig(), fit, 64)


def test_a_decode_step_of_one_sequence_reads_the_weights_once() -> None:
    model, fit, engine = _model()
    costs = engine.times.decode
    assert costs.weight_bytes == pytest.approx(1 / (3350e9 * UNCALIBRATED_GPU.bandwidth_share))
    least = (fit.weights.value or 0) * costs.weight_bytes + UNCALIBRATED_GPU.step_s
    assert model.decode_s(1, 0.0) == pytest.approx(least, rel=0.01)


def test_larger_batches_take_longer_and_yield_more() -> None:
    model, _, _ = _model()
    times = [model.decode_s(batch, 1000) for batch in (1, 8, 64)]
    assert times == sorted(times)
    assert 64 / times[2] > 8 / times[1] > 1 / times[0]


def test_a_mixture_reads_few_experts_for_one_token_and_all_for_many() -> None:
    card = load_model_cards()["qwen3-30b-a3b"]
    spec = card.architecture.spec()
    assert spec is not None
    architecture = card.architecture
    shape = Shape(
        spec=spec,
        weight_bytes=2.0 * (spec.num_parameters or 0),
        kv_bytes_per_token=1.0,
        num_experts=architecture.num_experts,
        num_experts_per_token=architecture.num_experts_per_token,
    )
    active = (spec.num_active_parameters or 0) / (spec.num_parameters or 1)
    assert shape.decode(1, 0).weight_bytes == pytest.approx(active * shape.weight_bytes, rel=0.01)
    assert shape.decode(512, 0).weight_bytes == pytest.approx(shape.weight_bytes, rel=0.01)


def test_a_window_bounds_what_a_layer_reads_and_scores() -> None:
    card = load_model_cards()["gemma-3-27b-it"]
    spec = card.architecture.spec()
    assert spec is not None
    shape = Shape(spec=spec, weight_bytes=1.0, kv_bytes_per_token=1.0)
    full = replace(shape, spec=replace(spec, layer_windows=()))
    assert shape.decode(1, 500).kv_bytes == full.decode(1, 500).kv_bytes == 500
    slides = sum(window is not None for window in spec.layer_windows) / spec.num_layers
    assert shape.decode(1, 100_000).kv_bytes == pytest.approx(slides * 1024 + (1 - slides) * 100_000)


def test_a_prompt_in_chunks_is_the_work_of_its_steps() -> None:
    model = load_model_cards()["llama-3.1-8b-instruct"]
    spec = model.architecture.spec()
    assert spec is not None
    shape = Shape(spec=spec, weight_bytes=1e9, kv_bytes_per_token=1e5)
    whole = shape.prefill(1000, step_tokens=512)
    parts = [shape.step([(0, 512)], 0), shape.step([(512, 488)], 1)]
    for name in ("weight_bytes", "linear_flops", "head_flops", "sequences", "steps"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(part, name) for part in parts))
    assert whole.attention_flops == pytest.approx(sum(part.attention_flops for part in parts), rel=0.01)


def test_a_prediction_keeps_its_limits_and_a_tighter_limit_costs_capacity() -> None:
    free = _predict()
    tight = _predict(SloConfig(ttft_ms=200, tpot_ms=12))
    assert isinstance(free, Prediction)
    assert isinstance(tight, Prediction)
    assert tight.tpot_s <= 0.012
    assert tight.ttft_s <= 0.2 * 1.0001
    assert tight.requests_per_s < free.requests_per_s


def test_a_limit_that_one_request_alone_misses_is_named_with_the_best_there_is() -> None:
    missed = _predict(SloConfig(tpot_ms=1))
    assert isinstance(missed, Missed)
    assert (missed.limit, missed.asked) == ("tpot_ms", 1)
    assert isinstance(_predict(SloConfig(tpot_ms=missed.best + 0.01)), Prediction)
    late = _predict(SloConfig(ttft_ms=1))
    assert isinstance(late, Missed)
    assert late.limit == "ttft_ms"


def test_watts_lie_between_idle_and_tdp_of_the_chips() -> None:
    for chips in (0.5, 1, 2):
        found = _predict(chips=chips)
        assert isinstance(found, Prediction)
        assert 70 * chips == pytest.approx(found.idle_w)
        assert found.idle_w is not None
        assert found.busy_w is not None
        assert found.idle_w < found.busy_w <= 700 * chips


def test_a_card_without_a_needed_figure_gives_its_name_not_a_number() -> None:
    assert engine_of(load_chip_cards()["hygon-k100"], "bf16", 1, 1) == "the card of hygon-k100 has no memory bandwidth"
    blank = H100.model_copy(
        update={"compute": H100.compute.model_copy(update={"bf16_tflops": None, "fp16_tflops": None})}
    )
    assert engine_of(blank, "bf16", 1, 1) == "the card of h100-sxm has no rate that bf16 could be computed at"
    nameless = engine_of(H100.model_copy(update={"tdp_w": None}), "bf16", 1, 1)
    assert isinstance(nameless, Engine)
    assert nameless.full_w is None


@pytest.mark.parametrize(("kind", "idle_w", "full_w"), [("counter", 50.0, 300.0), ("modelled", 70.0, 700.0)])
def test_measured_watts_count_and_modelled_ones_do_not(kind: str, idle_w: float, full_w: float) -> None:
    costs = Costs(steps=1.0)
    found = Calibrated(
        times=StepTimes(prefill=costs, decode=costs, kind="measured", source=""),
        power=Power(source="p", kind=kind, detail="", idle_w=50.0, busy_w=300.0),
        weight_bytes=1.0,
        kv_bytes_per_element=2.0,
        load_s=1.0,
    )
    engine = calibrated_engine(found, H100, 1)
    assert (engine.idle_w, engine.full_w) == (idle_w, full_w)


def test_a_part_of_a_chip_takes_so_much_longer_but_for_the_step_itself() -> None:
    found = Calibrated(
        times=StepTimes(
            prefill=Costs(linear_flops=1.0), decode=Costs(weight_bytes=2.0, steps=3.0), kind="measured", source=""
        ),
        power=Power(source="", kind="none", detail="", idle_w=None, busy_w=None),
        weight_bytes=1.0,
        kv_bytes_per_element=2.0,
        load_s=None,
    )
    times = calibrated_engine(found, None, 0.25).times
    assert (times.prefill.linear_flops, times.decode.weight_bytes, times.decode.steps) == (4.0, 8.0, 3.0)
