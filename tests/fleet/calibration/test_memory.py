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


def test_each_part_goes_by_the_factor_that_was_seen() -> None:
    found = _corrected([SEEN, SEEN])
    assert found.weights.value == pytest.approx(1.5e9)
    assert (found.activations.value or 0) + (found.overhead.value or 0) == pytest.approx(5e8 * 4 / 5)
    assert found.kv_cache == ESTIMATE.kv_cache
    assert "seen in 2 loads" in found.weights.source


def test_the_error_is_what_loads_differ_by_and_never_nothing() -> None:
    alike = _corrected([SEEN, SEEN]).weights
    apart = _corrected([SEEN, SEEN, replace(SEEN, weight_bytes=1.8e8, resident_bytes=5.8e8)]).weights
    assert alike.relative_error is not None
    assert apart.relative_error is not None
    assert 0 < alike.relative_error < apart.relative_error < 0.5
    assert (apart.value or 0) * (1 + apart.relative_error) >= 1.8e9  # the worst load that was seen is within it


def test_another_version_corrects_with_wider_errors_until_its_own_loads_were_seen() -> None:
    newer = {**CELL, "versions": "mxn=2"}
    carried, own = _corrected([SEEN], newer), _corrected([SEEN, replace(SEEN, versions="mxn=2")], newer)
    assert carried.weights.value == own.weights.value
    assert (carried.weights.relative_error or 0) >= (own.weights.relative_error or 0) + 0.2
    assert "other versions" in carried.weights.source
    assert "other versions" not in own.weights.source


def test_weights_are_corrected_by_their_own_family_and_the_rest_by_any() -> None:
    found = _corrected([SEEN], {**CELL, "family": "gemma3_text"})
    assert found.weights == ESTIMATE.weights
    assert found.overhead.value == pytest.approx(4e8 * 4 / 5)
