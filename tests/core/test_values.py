"""Values that refuse to be built wrong."""

from __future__ import annotations

import pytest

from mxn.core.clock import FakeClock
from mxn.core.model import LoadSettings
from mxn.core.quantity import Provenance, Quantity


def test_an_unknown_quantity_is_none_with_a_reason_and_never_a_number() -> None:
    unknown = Quantity.unavailable("W", "no meter")
    assert unknown.value is None
    assert unknown.source == "no meter"
    with pytest.raises(ValueError, match="unavailable"):
        Quantity(value=0.0, unit="W", provenance=Provenance.UNAVAILABLE, source="no meter")
    with pytest.raises(ValueError, match="unavailable"):
        Quantity(value=None, unit="W", provenance=Provenance.MEASURED, source="nvml")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_quantity_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Quantity(value=value, unit="W", provenance=Provenance.MEASURED, source="nvml")


@pytest.mark.parametrize("field", ["block_size", "max_num_seqs", "max_step_tokens"])
def test_load_settings_refuse_impossible_limits(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        LoadSettings(**{field: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "divided"),
    [
        (LoadSettings(), (32, 2048)),
        (LoadSettings(max_num_seqs=32), (16, 2048)),
        (LoadSettings(max_num_seqs=8), (8, 2048)),
        (LoadSettings(max_num_seqs=2), (2, 8192)),
        (LoadSettings(context_length=8192), (8, 8192)),
        (LoadSettings(context_length=1024), (64, 1024)),
    ],
)
def test_an_auto_cache_is_divided_into_slots_for_many_sequences(
    settings: LoadSettings, divided: tuple[int, int]
) -> None:
    context = settings.context_length or 8192
    assert settings.divide_slots(context, settings.auto_kv_tokens(context)) == divided


def test_a_cache_that_holds_no_whole_slot_has_none() -> None:
    assert LoadSettings().divide_slots(8192, 2047) == (0, 2048)
    assert LoadSettings(context_length=4096).divide_slots(8192, 4095) == (0, 4096)


def test_a_monotonic_clock_cannot_go_back() -> None:
    clock = FakeClock()
    clock.advance(2.0)
    assert clock.now_s() == 2.0
    with pytest.raises(ValueError, match="go back"):
        clock.advance(-1.0)
