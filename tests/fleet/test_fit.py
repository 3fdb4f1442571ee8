from __future__ import annotations

from dataclasses import replace

import pytest

from mxn.config.cluster import BackendConfig
from mxn.config.model_card import load_model_cards
from mxn.core.chip import Chip
from mxn.errors import ConfigError, ModelError
from mxn.fleet.fit import GIB, Fit, fit_model, kv_bytes_per_token
from mxn.fleet.fit_report import fit_reports

CHIP = Chip(uid="gpu-x", kind="x", name="X", vendor="x", memory_bytes=80 * GIB, cores=1, facts={"target": "sm_90"})
ENGINE = BackendConfig(name="own", chips=("x",), quantisations=("bf16",), max_chips=8, overhead_gib=1.0)


def _fit(
    model: str = "llama-3.1-8b-instruct", *, memory_gib: float = 80, num_chips: int = 1, sequences: int = 1
) -> Fit:
    card = load_model_cards()[model]
    spec = card.architecture.spec()
    assert spec is not None
    return fit_model(
        card.architecture,
        spec,
        ENGINE,
        CHIP,
        quantisation="bf16",
        context=8192,
        sequences=sequences,
        memory_bytes=memory_gib * GIB,
        num_chips=num_chips,
    )


def test_weights_and_kv_cache_are_what_the_architecture_says() -> None:
    fit = _fit(sequences=4)
    assert fit.weights.value == 2 * 8_030_261_248
    assert fit.kv_cache.value == 4 * 8192 * (32 * 8 * 256 * 2)
    assert fit.overhead.value == GIB
    assert fit.needed_bytes == sum(part.value or 0 for part in fit.parts.values())


def test_every_part_says_where_it_comes_from() -> None:
    assert all(part.source for part in _fit().parts.values())


def test_fits_holds_with_every_error_against_it_and_the_missing_memory_makes_it_fit() -> None:
    small = _fit(memory_gib=18)
    assert small.verdict == "does not fit"
    share = 0.95  # a twentieth of any memory is kept in reserve
    enough = (18 + small.missing_bytes / GIB / share) * (1 + 1e-9)
    assert _fit(memory_gib=enough).verdict == "fits"
    assert _fit(memory_gib=enough - 0.2).verdict == "may fit"


def test_more_chips_divide_weights_and_kv_cache_and_nothing_else() -> None:
    one, four = _fit(), _fit(num_chips=4)
    assert one.weights.value == 4 * (four.weights.value or 0)
    assert one.kv_bytes_per_token == 4 * four.kv_bytes_per_token
    assert one.activations.value == four.activations.value


def test_latent_kv_takes_what_the_latent_form_takes() -> None:
    card = load_model_cards()["deepseek-r1"]
    spec = card.architecture.spec()
    assert spec is not None
    assert kv_bytes_per_token(card.architecture, spec, 2.0) == 61 * 576 * 2


def test_room_for_kv_cache_grows_by_what_the_memory_does() -> None:
    grown = _fit(memory_gib=81).kv_room_bytes - _fit(memory_gib=80).kv_room_bytes
    assert grown == pytest.approx(0.95 * GIB)


def test_a_report_covers_every_format_the_backend_offers() -> None:
    reports = fit_reports("qwen3-32b", chip="h100-sxm")
    verdicts = {report.quantisation: report.fit.verdict for report in reports}
    assert verdicts["fp32"] == "does not fit"
    assert verdicts["fp8"] == "fits"
    assert all(report.backend == "cuda" for report in reports)
    assert "weights" in "\n".join(reports[0].lines())


@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        ({"model": "no-such"}, ModelError, "no model card"),
        ({"model": "qwen3-8b", "chip": "h900"}, ConfigError, 'no chip card is called "h900"'),
        ({"model": "qwen3-8b", "chip": "H 900"}, ConfigError, "no id of a chip card"),
        ({"model": "qwen3-8b", "chip": "epyc-9654"}, ConfigError, "host_memory_gib"),
        ({"model": "qwen3-8b", "chip": "tpu-v6e"}, ConfigError, "no backend of mxn reaches tpu-v6e"),
        ({"model": "qwen3-0.6b", "chip": "t4", "quantisation": "bf16"}, ConfigError, "cuda on t4 offers fp16, fp32"),
    ],
)
def test_what_cannot_be_said_is_refused_with_what_there_is(arguments, kind, part) -> None:
    with pytest.raises(kind, match=part):
        fit_reports(**arguments)


def _here(backend: str, quantisation: str) -> Fit:
    spec = load_model_cards()["smollm2-135m-instruct"].architecture.spec()
    assert spec is not None
    chip = Chip(uid="cpu-0", kind=None, name="CPU", vendor="v", memory_bytes=64 * GIB, cores=2)
    return fit_model(
        load_model_cards()["smollm2-135m-instruct"].architecture,
        spec,
        backend,
        chip,
        quantisation=quantisation,  # type: ignore[arg-type]
        context=1024,
        sequences=1,
        memory_bytes=8 * GIB,
    )


def test_slots_are_counted_in_the_numbers_that_their_backend_keeps() -> None:
    assert _here("onnx", "int8").kv_bytes_per_token == 2 * _here("cpu", "int8").kv_bytes_per_token


def test_what_loading_holds_counts_where_it_is_more_than_what_stays() -> None:
    fit = _here("cpu", "int8")
    stays = sum(part.value or 0 for part in fit.parts.values())
    assert fit.loading is not None
    assert fit.loading.value is not None
    assert fit.needed_bytes == fit.loading.value + (fit.reserve.value or 0) > stays
    assert _here("cpu", "bf16").loading is None
    more = replace(fit, kv_cache=replace(fit.kv_cache, value=4.0 * GIB))
    assert more.needed_bytes == stays - (fit.kv_cache.value or 0) + 4.0 * GIB
