"""A number together with where it comes from. Unknown is None with a reason, never zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Provenance(StrEnum):
    """How a number came to be, from most to least trustworthy."""

    MEASURED = "measured"  # read from a counter or timed on this machine
    SAMPLED = "sampled"  # integrated from samples of a sensor
    DATASHEET = "datasheet"  # published by the vendor
    ESTIMATED = "estimated"  # computed by a model with a stated error
    SIMULATED = "simulated"  # produced by a fake chip
    UNAVAILABLE = "unavailable"  # nobody knows; value is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """A value in `unit` with its provenance.

    value: None exactly when provenance is UNAVAILABLE.
    relative_error: one-sided factor minus one (1.0 means "within a factor of two"); None when not stated.
    source: the counter, file, page or formula behind the number; for an unavailable one, the reason.
    """

    value: float | None
    unit: str
    provenance: Provenance
    source: str
    relative_error: float | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.provenance is Provenance.UNAVAILABLE):
            raise ValueError(f"a quantity is None exactly when unavailable, got {self.value!r} as {self.provenance}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a quantity is finite or unavailable, got {self.value!r} {self.unit}")

    @classmethod
    def unavailable(cls, unit: str, reason: str) -> Quantity:
        """A quantity nobody knows, with the reason."""
        return cls(value=None, unit=unit, provenance=Provenance.UNAVAILABLE, source=reason)
