"""How many replicas Serve should keep: by the sequences there are, and by how many of them missed their SLO."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

_WINDOW_S = 30.0
"""Sequences that ended so lately are held against the SLO."""

_UTILISATION = 0.8
"""Share of its batch that a replica is planned to be filled to, as in the planner."""


class LatencyWindow:
    """Which of the newest sequences were within the SLO. ttft_s, tpot_s: its limits, None where there is none."""

    def __init__(self, ttft_s: float | None, tpot_s: float | None) -> None:
        self._limits = ttft_s, tpot_s
        self._ended: deque[tuple[float, bool]] = deque(maxlen=4096)

    def begin(self) -> SequenceTiming:
        """A sequence came."""
        return SequenceTiming(self)

    def add(self, ttft_s: float, tpot_s: float | None) -> None:
        """Holds a sequence's times against the limits."""
        ttft_limit, tpot_limit = self._limits
        is_late = ttft_limit is not None and ttft_s > ttft_limit
        is_slow = tpot_limit is not None and tpot_s is not None and tpot_s > tpot_limit
        self._ended.append((time.monotonic(), is_late or is_slow))

    def missed_share(self) -> float:
        """Share of them that missed it; 0 when none ended lately."""
        oldest_s = time.monotonic() - _WINDOW_S
        while self._ended and self._ended[0][0] < oldest_s:
            self._ended.popleft()
        return sum(missed for _, missed in self._ended) / len(self._ended) if self._ended else 0.0


class SequenceTiming:
    """One sequence's times, from when it came to the replica."""

    def __init__(self, window: LatencyWindow) -> None:
        self._window = window
        self._begin_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        """Tokens came."""
        if num_tokens:
            self._last_s = time.monotonic()
            self._first_s = self._first_s or self._last_s
            self._num_tokens += num_tokens

    def end(self) -> None:
        """The sequence ended; one without a token says nothing of latency."""
        if self._first_s is not None:
            more = self._num_tokens - 1
            tpot_s = (self._last_s - self._first_s) / more if more else None
            self._window.add(self._first_s - self._begin_s, tpot_s)


class ScalingPolicy:
    """A policy for Serve's autoscaler, which asks it every few seconds and keeps to the bounds and delays by itself.

    batch: sequences that one replica decodes together within its SLO. percentile: of sequences that must meet it.
    """

    def __init__(self, batch: int, percentile: float) -> None:
        self._batch = batch
        self._allowed_share = 1 - percentile / 100

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted. context: Serve's `AutoscalingContext`."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        wanted = self.wanted(
            context.target_num_replicas,
            list(metrics.get("sequences", {}).values()),
            list(metrics.get("missed_share", {}).values()),
        )
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(low, min(high, wanted)), {}

    def wanted(self, target: int, sequences: list[float], missed_shares: list[float]) -> int:
        """Enough for all sequences at 80 % of the batch, and one more than there are while the SLO is missed."""
        if not sequences:
            return target  # nobody has reported yet
        enough = max(1, math.ceil(sum(sequences) / (self._batch * _UTILISATION) - 1e-9))
        is_missed = max(missed_shares, default=0.0) > self._allowed_share
        return max(enough, target + 1) if is_missed else enough
