"""Figures of one repetition, and their spread over repetitions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mxn.bench.client import RequestResult

METRIC_UNITS = {
    "duration_s": "s",
    "output_tokens_per_s": "tokens/s",
    "prompt_tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "tokens/s",
    "ttft_ms": "ms",
    "ttft_p99_ms": "ms",
    "tpot_ms": "ms",
    "itl_ms": "ms",
    "itl_p99_ms": "ms",
    "request_ms": "ms",
    "client_cpu_share": "of one core",
}
"""Every metric with its unit.

duration: first request sent to last answer complete. output, prompt tokens/s: all such tokens over the duration (cached
prompt tokens included). TTFT: request sent to first output. TPOT: (last output - first output) / (output tokens - 1),
per request, undefined for one token. decode tokens/s: its inverse. ITL: gaps between pieces of a stream. Medians over
requests unless p99.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and range over `n` repetitions."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), n=len(values))


def metrics(results: Sequence[RequestResult], client_cpu_s: float | None) -> dict[str, float]:
    """Figures of one repetition; those that are undefined (TPOT of one-token answers, say) are left out.

    client_cpu_s: CPU time of the load generator; None when it cannot be told from the engine's, in one process.
    Failed requests count in no figure; the caller reports them.
    """
    good = [r for r in results if r.error is None and r.chunk_times_s]
    if not good:
        return {}
    duration_s = max(r.end_s for r in good) - min(r.start_s for r in good)
    ttft_ms = [1e3 * (r.chunk_times_s[0] - r.start_s) for r in good]
    tpot_s = [
        (r.chunk_times_s[-1] - r.chunk_times_s[0]) / (r.num_output_tokens - 1)
        for r in good
        if r.num_output_tokens > 1 and len(r.chunk_times_s) > 1
    ]
    itl_ms = [1e3 * (b - a) for r in good for a, b in zip(r.chunk_times_s, r.chunk_times_s[1:], strict=False)]
    figures = {
        "duration_s": duration_s,
        "output_tokens_per_s": sum(r.num_output_tokens for r in good) / duration_s,
        "ttft_ms": statistics.median(ttft_ms),
        "ttft_p99_ms": percentile(ttft_ms, 99),
        "request_ms": statistics.median(1e3 * (r.end_s - r.start_s) for r in good),
    }
    if client_cpu_s is not None:
        figures["client_cpu_share"] = client_cpu_s / duration_s
    if all(r.num_prompt_tokens is not None for r in good):
        figures["prompt_tokens_per_s"] = sum(r.num_prompt_tokens or 0 for r in good) / duration_s
    if tpot_s and statistics.median(tpot_s) > 0:
        figures["tpot_ms"] = 1e3 * statistics.median(tpot_s)
        figures["decode_tokens_per_s"] = 1 / statistics.median(tpot_s)
        figures["itl_ms"] = statistics.median(itl_ms)
        figures["itl_p99_ms"] = percentile(itl_ms, 99)
    return figures


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the others do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
