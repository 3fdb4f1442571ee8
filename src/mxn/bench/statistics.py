"""What repeated runs allow to say: intervals of means and ratios, block means, and when no difference is shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95

# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom (any table of the distribution).
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value with its 95 % interval; without one (both ends None) where there was a single run."""

    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g} (one run, no interval)"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def t95(degrees: float) -> float:
    """The two-sided 95 % point of Student's t with so many degrees of freedom (at least 1)."""
    whole = int(degrees)
    if whole <= 30:
        return _T95[max(whole, 1) - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent runs with its t-interval."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(value=mean, low=None, high=None, n=n)
    half = t95(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(value=mean, low=mean - half, high=mean + half, n=n)


def ratio_interval(base: Sequence[float], other: Sequence[float], *, is_paired: bool) -> Interval:
    """How many times `base` `other` is: the mean of log ratios and its t-interval, taken back.

    is_paired: run i of both met the same conditions, as when arms take turns; then what hits both cancels. Otherwise
    Welch's interval of two means of logarithms. Values must be positive.
    """
    logs_a, logs_b = [math.log(v) for v in base], [math.log(v) for v in other]
    if is_paired and len(logs_a) == len(logs_b):
        found = mean_interval([b - a for a, b in zip(logs_a, logs_b, strict=True)])
        middle, half = found.value, None if found.high is None else found.high - found.value
    else:
        middle = statistics.fmean(logs_b) - statistics.fmean(logs_a)
        half = _welch_half(logs_a, logs_b)
    if half is None:
        return Interval(value=math.exp(middle), low=None, high=None, n=min(len(base), len(other)))
    return Interval(
        value=math.exp(middle), low=math.exp(middle - half), high=math.exp(middle + half), n=min(len(base), len(other))
    )


def verdict(ratio: Interval) -> str:
    """The ratio in words: what was shown, or that nothing was."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}x, one run: nothing is shown"
    text = f"{ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"
    return f"no difference shown ({text})" if ratio.low <= 1 <= ratio.high else text


def block_rates(events: Sequence[tuple[float, float]], begin_s: float, end_s: float, num_blocks: int) -> list[float]:
    """(seconds, amount) events as amounts per second in equal blocks of a stretch of time."""
    length_s = (end_s - begin_s) / num_blocks
    sums = [0.0] * num_blocks
    for at_s, amount in events:
        if begin_s <= at_s < end_s:
            sums[min(int((at_s - begin_s) / length_s), num_blocks - 1)] += amount
    return [total / length_s for total in sums]


def slope_interval(values: Sequence[float]) -> Interval:
    """Least-squares change per step of a series, with its 95 % interval. Needs three values."""
    n = len(values)
    mean_x, mean_y = (n - 1) / 2, statistics.fmean(values)
    sxx = sum((i - mean_x) ** 2 for i in range(n))
    slope = sum((i - mean_x) * (y - mean_y) for i, y in enumerate(values)) / sxx
    rest = sum((y - mean_y - slope * (i - mean_x)) ** 2 for i, y in enumerate(values))
    half = t95(n - 2) * math.sqrt(rest / (n - 2) / sxx)
    return Interval(value=slope, low=slope - half, high=slope + half, n=n)


def _welch_half(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 2 or len(b) < 2:
        return None
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if va + vb == 0:
        return 0.0
    degrees = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t95(degrees) * math.sqrt(va + vb)
