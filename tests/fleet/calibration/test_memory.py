"""Estimates corrected by what loads took, on made-up loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from mxn.backends.base import MemoryEstimate
from mxn.core.quantity import Provenance, Quantity
from mxn.fleet.calibration.memory import MemoryObservation, corrected

CELL = {"family": "llama", "chip": "Chip", "backend": "cpu", "versions": "mxn=1", "quantisation": "int8"}
SEEN = MemoryObservation(
    **CELL,
    weight_bytes=1.5e8,
    resident_bytes=5.5e8,
    estimated_weight_bytes=1e8,
    estimated_other_bytes=5e8,
)


def _part(value: float, error: float = 0.5) -> Quantity:
    return Quantity(value=value, unit="B", provenance=Provenance.ESTIMATED, source="formula", relative_error=error)


ESTIMATE = MemoryEstimate(weights=_part(1e9), kv_cache=_part(7.0), activations=_part(1e8), overhead=_part(4e8))


def _corrected(observations: list[MemoryObservation], cell: Mapping[str, str] = CELL) -> MemoryEstimate:
    return corrected(ESTIMATE, observations, **cell)


def test_nothing_seen_leaves_the_estimate_as_it_was() -> None:
    assert _corrected([]) == ESTIMATE
    assert _corrected([replace(SEEN, chip="Other"), replace(SEEN, backend="onnx")]) == ESTIMATE


def test_all_that_stays_goes_by_the_factor_that_was_seen() -> None:
    found = _corrected([SEEN, SEEN, SEEN])
    factor = 5.5e8 / 6e8
    assert found.weights.value == pytest.approx(1e9 * factor)
    assert found.overhead.value == pytest.approx(4e8 * factor)
    assert (found.activations, found.kv_cache) == (ESTIMATE.activations, ESTIMATE.kv_cache)
    assert "seen in 2 loads" in found.weights.source


def test_loads_whose_large_cache_may_be_counted_do_not_count_beside_others() -> None:
    touched = replace(SEEN, resident_bytes=2e9, kv_bytes=3e9)
    assert _corrected([touched, SEEN]).weights == _corrected([SEEN]).weights
    assert _corrected([touched, SEEN, touched, SEEN]).weights == _corrected([SEEN, SEEN, SEEN]).weights


def test_what_loading_holds_has_a_factor_of_its_own() -> None:
    estimate = replace(ESTIMATE, loading=_part(2e9))
    seen = [replace(SEEN, peak_bytes=9e8, estimated_peak_bytes=1e9)] * 2
    found = corrected(estimate, seen, **CELL).loading
    assert found is not None
    assert found.value == pytest.approx(1.8e9)
    assert corrected(estimate, [SEEN], **CELL).loading == estimate.loading


def test_the_error_is_what_loads_differ_by_and_never_nothing() -> None:
    alike = _corrected([SEEN] * 3).weights
    worst = replace(SEEN, resident_bytes=7e8)
    apart = _corrected([SEEN, SEEN, worst, worst, worst]).weights
    assert alike.relative_error is not None
    assert apart.relative_error is not None
    assert 0 < alike.relative_error < apart.relative_error < 0.5
    assert (apart.value or 0) * (1 + apart.relative_error) >= 1e9 * 7 / 6  # the worst load that was seen is within it


def test_another_version_corrects_with_wider_errors_until_its_own_loads_were_seen() -> None:
    newer = {**CELL, "versions": "mxn=2"}
    carried, own = _corrected([SEEN], newer), _corrected([SEEN, replace(SEEN, versions="mxn=2")], newer)
    assert carried.weights.value == own.weights.value
    assert (carried.weights.relative_error or 0) >= (own.weights.relative_error or 0) + 0.2
    assert "other versions" in carried.weights.source
    assert "other versions" not in own.weights.source


def test_loads_of_another_family_correct_what_is_beside_the_weights() -> None:
    found = _corrected([SEEN], {**CELL, "family": "gemma3_text"})
    assert found.weights == ESTIMATE.weights
    assert found.overhead.value == pytest.approx(4e8 * 4 / 5)
