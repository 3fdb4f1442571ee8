"""What a replica can do, learnt from the counters that it reports."""

from __future__ import annotations

from mxn.engine.stats import EngineStats

_WINDOW_S = 0.25
"""Busy seconds between two looks at the counters."""

_FORGETS = 0.98
"""How much of what was learnt stays with each new window: half of it is gone after about 35 windows."""

_MIN_TOKENS = 100


class Meter:
    """Capacity, the price of a prompt token, and joules per token of one replica. `note` is given its counters.

    A window of w seconds in which s steps computed t tokens is taken for w = a s + b t; a and b are fitted by least
    squares over the windows so far, old ones counting less. b is what one more prompt token costs.
    tokens_per_s: the highest rate of a window, forgotten slowly, so that idle times do not look like weakness; None
      until there was one.
    prompt_token_s: b; None until steps of different sizes tell a and b apart.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self.prompt_token_s: float | None = None
        self.joules_per_token: float | None = None
        self.mean_output_tokens: float | None = None
        self._busy_s = 0.0
        self._num_steps = self._num_tokens = 0
        self._ss = self._st = self._tt = self._sw = self._tw = 0.0

    def note(self, stats: EngineStats) -> None:
        """Looks at the newest counters."""
        window_s = stats.busy_s - self._busy_s
        if window_s < _WINDOW_S:
            return
        steps, tokens = stats.num_steps - self._num_steps, stats.num_computed_tokens - self._num_tokens
        self._busy_s, self._num_steps, self._num_tokens = stats.busy_s, stats.num_steps, stats.num_computed_tokens
        if stats.num_finished:
            self.mean_output_tokens = stats.num_output_tokens / stats.num_finished
        if stats.request_energy_j is not None and stats.num_output_tokens >= _MIN_TOKENS:
            self.joules_per_token = stats.request_energy_j / stats.num_output_tokens
        if tokens > 0:
            self.tokens_per_s = max(tokens / window_s, _FORGETS * (self.tokens_per_s or 0.0))
            self._fit(steps, tokens, window_s)

    def _fit(self, steps: int, tokens: int, window_s: float) -> None:
        self._ss = _FORGETS * self._ss + steps * steps
        self._st = _FORGETS * self._st + steps * tokens
        self._tt = _FORGETS * self._tt + tokens * tokens
        self._sw = _FORGETS * self._sw + steps * window_s
        self._tw = _FORGETS * self._tw + tokens * window_s
        determinant = self._ss * self._tt - self._st * self._st
        if determinant > 1e-3 * self._ss * self._tt:
            price_s = (self._ss * self._tw - self._st * self._sw) / determinant
            if price_s > 0:
                self.prompt_token_s = price_s
