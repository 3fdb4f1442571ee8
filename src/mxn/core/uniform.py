"""The random numbers that tokens are drawn with, the same on every chip."""

from __future__ import annotations

_MASK64 = 2**64 - 1


def uniform(seed: int, counter: int) -> float:
    """The `counter`-th number in [0, 1) of the generator with this seed: two rounds of splitmix64 (Steele, 2014)."""
    state = _mix64(_mix64(seed & _MASK64) + counter * 0x9E3779B97F4A7C15)
    return (state >> 11) * 2.0**-53


def _mix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
