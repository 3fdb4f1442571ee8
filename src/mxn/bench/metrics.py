"""Figures of one repetition or of a part of it, and their spread over repetitions."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mxn.bench.client import RequestResult
from mxn.bench.statistics import block_rates, mean_interval, slope_interval
from mxn.errors import ConfigError

METRIC_UNITS = {
    "duration_s": "s",
    "requests_per_s": "requests/s",
    "goodput_per_s": "requests/s",
    "output_tokens_per_s": "tokens/s",
    "prompt_tokens_per_s": "tokens/s",
    "total_tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "tokens/s",
    "ttft_ms": "ms",
    "ttft_p90_ms": "ms",
    "ttft_p99_ms": "ms",
    "tpot_ms": "ms",
    "tpot_p90_ms": "ms",
    "tpot_p99_ms": "ms",
    "itl_ms": "ms",
    "itl_p99_ms": "ms",
    "request_ms": "ms",
    "request_p90_ms": "ms",
    "request_p99_ms": "ms",
    "in_flight": "requests",
    "queue_mean_ms": "ms",
    "lateness_p99_ms": "ms",
    "client_cpu_share": "of one core",
    "client_lag_p99_ms": "ms",
}
"""Every metric with its unit; formulas are in docs/benchmarking.md. Medians over requests unless it says otherwise."""

STEADY_SHARE = 0.9
"""A closed loop is steady while this share of its peak is in flight, an open loop but for its outer tenths."""

STEADY_MIN_S = 20.0
STEADY_MIN_PART = 0.5
_NUM_BLOCKS = 10
_DIP_S = 0.1  # between one request's end and the next one's start


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and range over `n` repetitions, and their mean with its 95 % interval when there are at least two."""

    median: float
    low: float
    high: float
    n: int
    mean: float | None = None
    ci95: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        found = mean_interval(values)
        return cls(
            median=statistics.median(values),
            low=min(values),
            high=max(values),
            n=len(values),
            mean=found.value,
            ci95=None if found.low is None or found.high is None else (found.low, found.high),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """Limits that a request must meet to count towards goodput; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    request_ms: float | None = None

    def is_met(self, result: RequestResult) -> bool:
        """True for a successful request within every limit."""
        if result.error is not None or not result.chunk_times_s:
            return False
        tpot_s = _tpot_s(result)
        found = (
            (self.ttft_ms, result.chunk_times_s[0] - result.start_s),
            (self.tpot_ms, 0.0 if tpot_s is None else tpot_s),
            (self.request_ms, result.end_s - result.start_s),
        )
        return all(limit is None or 1e3 * seconds <= limit for limit, seconds in found)


def parse_slo(text: str) -> Slo:
    """Limits from text such as "ttft=500,tpot=50,request=10000", in milliseconds. Raises: ConfigError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            limits[f"{name}_ms"] = float(value)
            if name not in ("ttft", "tpot", "request") or limits[f"{name}_ms"] <= 0:
                raise ValueError(name)
        except ValueError as err:
            raise ConfigError(
                f"{part!r} is not a limit; expected ttft=MS, tpot=MS or request=MS, separated by commas"
            ) from err
    return Slo(**limits)


def metrics(results: Sequence[RequestResult], client_cpu_s: float | None, slo: Slo | None = None) -> dict[str, float]:
    """Figures of a whole repetition: first request sent to last answer complete.

    client_cpu_s: CPU time of the load generator; None when it cannot be told from the engine's, in one process.
    Failed requests count in no figure; the caller reports them.
    """
    good = [r for r in results if r.error is None and r.chunk_times_s]
    if not good:
        return {}
    begin_s, end_s = min(r.start_s for r in good), max(r.end_s for r in good)
    figures = window_metrics(results, begin_s, end_s, slo)
    if client_cpu_s is not None:
        figures["client_cpu_share"] = client_cpu_s / (end_s - begin_s)
    late_ms = [1e3 * (r.start_s - r.scheduled_s) for r in results if r.scheduled_s is not None]
    if late_ms:
        figures["lateness_p99_ms"] = percentile(late_ms, 99)
    return figures


def window_metrics(
    results: Sequence[RequestResult], begin_s: float, end_s: float, slo: Slo | None = None
) -> dict[str, float]:
    """Figures of a stretch of time; those that are undefined (TPOT of one-token answers, say) are left out.

    Tokens count where they arrived, prompt tokens where the first output did; requests count where they ended.
    """
    seconds = end_s - begin_s
    good = [r for r in results if r.error is None and r.chunk_times_s]
    ended = [r for r in good if begin_s <= r.end_s <= end_s]
    first = [r for r in good if begin_s <= r.chunk_times_s[0] <= end_s]
    if not ended or not first or seconds <= 0:
        return {}
    output = sum(output_tokens_within(r, begin_s, end_s) for r in good)
    ttft_ms = [1e3 * (r.chunk_times_s[0] - r.start_s) for r in first]
    request_ms = [1e3 * (r.end_s - r.start_s) for r in ended]
    tpot_s = [t for t in map(_tpot_s, ended) if t is not None]
    itl_ms = [1e3 * (b - a) for r in good for a, b in pairwise(r.chunk_times_s) if begin_s <= b <= end_s]
    busy_s = sum(max(0.0, min(r.end_s, end_s) - max(r.start_s, begin_s)) for r in results)
    figures = {
        "duration_s": seconds,
        "requests_per_s": len(ended) / seconds,
        "output_tokens_per_s": output / seconds,
        **_quantiles("ttft", ttft_ms),
        **_quantiles("request", request_ms),
        "in_flight": busy_s / seconds,
    }
    if slo is not None:
        figures["goodput_per_s"] = sum(slo.is_met(r) for r in ended) / seconds
    if all(r.num_prompt_tokens is not None for r in first):
        prompt = sum(r.num_prompt_tokens or 0 for r in first)
        figures["prompt_tokens_per_s"] = prompt / seconds
        figures["total_tokens_per_s"] = (prompt + output) / seconds
    if tpot_s and statistics.median(tpot_s) > 0:
        figures |= _quantiles("tpot", [1e3 * t for t in tpot_s])
        figures["decode_tokens_per_s"] = 1 / statistics.median(tpot_s)
    if itl_ms:
        figures["itl_ms"] = statistics.median(itl_ms)
        figures["itl_p99_ms"] = percentile(itl_ms, 99)
    return figures


def output_tokens_within(result: RequestResult, begin_s: float, end_s: float) -> float:
    """Output tokens of a request that arrived in a stretch of time, its pieces taken to carry as many each."""
    if not result.chunk_times_s or result.error is not None:
        return 0.0
    if begin_s <= result.chunk_times_s[0] and result.chunk_times_s[-1] <= end_s:
        return result.num_output_tokens
    inside = sum(begin_s <= t <= end_s for t in result.chunk_times_s)
    return result.num_output_tokens * inside / len(result.chunk_times_s)


def steady_window(results: Sequence[RequestResult], *, is_open: bool) -> tuple[float, float] | str:
    """(begin, end) of the steady part of a run by the rule at `STEADY_SHARE`, or why there is none."""
    if not results:
        return "there are no requests"
    begin_s, end_s = min(r.start_s for r in results), max(r.end_s for r in results)
    if is_open:
        last_s = max(r.start_s for r in results)
        found = (begin_s + 0.1 * (last_s - begin_s), last_s - 0.1 * (last_s - begin_s))
    else:
        found = _longest_busy_stretch(results)
    length_s = found[1] - found[0]
    if length_s < STEADY_MIN_S or length_s < STEADY_MIN_PART * (end_s - begin_s):
        return (
            f"its steady part is {length_s:.3g} s of {end_s - begin_s:.3g} s; expected at least {STEADY_MIN_S:g} s "
            f"and {STEADY_MIN_PART:.0%}"
        )
    return found


def drift_warning(results: Sequence[RequestResult], begin_s: float, end_s: float) -> str | None:
    """What to say when the output rate of a window's blocks rises or falls beyond chance; None when it does not."""
    events = [
        (t, r.num_output_tokens / len(r.chunk_times_s)) for r in results if r.error is None for t in r.chunk_times_s
    ]
    rates = block_rates(events, begin_s, end_s, _NUM_BLOCKS)
    slope, mean = slope_interval(rates), statistics.fmean(rates)
    if slope.low is None or slope.high is None or slope.low <= 0 <= slope.high or not mean:
        return None
    return f"the output rate changes by {100 * slope.value * _NUM_BLOCKS / mean:+.0f} % over the steady part"


def error_counts(results: Sequence[RequestResult]) -> dict[str, int]:
    """Failed requests by kind."""
    return dict(Counter(r.error_kind or "other" for r in results if r.error is not None))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the others do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _quantiles(name: str, values_ms: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_ms": statistics.median(values_ms),
        f"{name}_p90_ms": percentile(values_ms, 90),
        f"{name}_p99_ms": percentile(values_ms, 99),
    }


def _tpot_s(result: RequestResult) -> float | None:
    if result.num_output_tokens < 2 or len(result.chunk_times_s) < 2:
        return None
    return (result.chunk_times_s[-1] - result.chunk_times_s[0]) / (result.num_output_tokens - 1)


def _longest_busy_stretch(results: Sequence[RequestResult]) -> tuple[float, float]:
    """The longest time with at least `STEADY_SHARE` of the peak number of requests in flight, short dips aside."""
    changes = sorted([(r.start_s, 1) for r in results] + [(r.end_s, -1) for r in results])
    levels, level = [], 0
    for at_s, change in changes:
        level += change
        levels.append((at_s, level))
    enough = STEADY_SHARE * max(level for _, level in levels)
    stretches: list[list[float]] = []
    for (at_s, level), (next_s, _) in pairwise(levels):
        if level < enough:
            continue
        if stretches and at_s - stretches[-1][1] < _DIP_S:
            stretches[-1][1] = next_s
        else:
            stretches.append([at_s, next_s])
    longest = max(stretches, key=lambda stretch: stretch[1] - stretch[0], default=[levels[0][0], levels[0][0]])
    return longest[0], longest[1]
