"""What a step of a model reads and computes, and the seconds that each part of it costs: time is linear in the work.

One form for both kinds of figures: costs out of a data sheet, and costs fitted to measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from mxn.core.model import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Amounts of one step, or the sum of several.

    weight_bytes, kv_bytes: read. longest_kv_bytes: of the sequence that has most, whose attention may not be divided
    among all cores. linear_flops: of the layers, for every token. attention_flops: of the scores and the
    weighted values. head_flops: of the output head, for every sequence that draws a token. sequences: that draw one.
    steps: how many steps it is.
    """

    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    longest_kv_bytes: float = 0.0
    linear_flops: float = 0.0
    attention_flops: float = 0.0
    head_flops: float = 0.0
    sequences: float = 0.0
    steps: float = 0.0

    def amounts(self) -> tuple[float, ...]:
        """The amounts in the order of `PARTS`."""
        return tuple(getattr(self, name) for name in PARTS)


PARTS = tuple(field.name for field in fields(Work))


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds for each unit of work; the names are those of `Work`."""

    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    longest_kv_bytes: float = 0.0
    linear_flops: float = 0.0
    attention_flops: float = 0.0
    head_flops: float = 0.0
    sequences: float = 0.0
    steps: float = 0.0

    def seconds(self, work: Work) -> float:
        """What the work takes."""
        return (
            self.weight_bytes * work.weight_bytes
            + self.kv_bytes * work.kv_bytes
            + self.longest_kv_bytes * work.longest_kv_bytes
            + self.linear_flops * work.linear_flops
            + self.attention_flops * work.attention_flops
            + self.head_flops * work.head_flops
            + self.sequences * work.sequences
            + self.steps * work.steps
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model as its work is reckoned from it.

    weight_bytes: of the whole model, as quantised. kv_bytes_per_token: of one token over all layers.
    num_experts, num_experts_per_token: of a mixture; None for a dense model.
    """

    spec: ModelSpec
    weight_bytes: float
    kv_bytes_per_token: float
    num_experts: int | None = None
    num_experts_per_token: int | None = None

    def decode(self, batch: float, context: float) -> Work:
        """One step that gives each of `batch` sequences, `context` tokens long, a token."""
        seen = self._seen(context)
        return Work(
            weight_bytes=self._read_bytes(batch),
            kv_bytes=batch * seen * self.kv_bytes_per_token,
            longest_kv_bytes=seen * self.kv_bytes_per_token,
            linear_flops=batch * self._linear,
            attention_flops=batch * seen * self._per_pair,
            head_flops=batch * self._head,
            sequences=batch,
            steps=1.0,
        )

    def prefill(self, tokens: float, *, start: float = 0.0, step_tokens: float = math.inf) -> Work:
        """The KV of `tokens` prompt tokens after `start` known ones, in steps of at most `step_tokens`."""
        steps = max(1.0, math.ceil(tokens / step_tokens)) if step_tokens < math.inf else 1.0
        pairs = tokens * (self._seen(start) + self._seen(start + tokens)) / 2
        return Work(
            weight_bytes=steps * self._read_bytes(tokens / steps),
            kv_bytes=self._seen(start) * self.kv_bytes_per_token,
            longest_kv_bytes=self._seen(start) * self.kv_bytes_per_token,
            linear_flops=tokens * self._linear,
            attention_flops=pairs * self._per_pair,
            head_flops=self._head,
            sequences=1.0,
            steps=steps,
        )

    def step(self, chunks: Sequence[tuple[int, int]], num_sampled: int) -> Work:
        """One step over (tokens already there, tokens computed now) of each of its sequences."""
        tokens = sum(count for _, count in chunks)
        pairs = sum(count * self._seen(start + (count + 1) / 2) for start, count in chunks)
        return Work(
            weight_bytes=self._read_bytes(tokens),
            kv_bytes=sum(self._seen(start) for start, _ in chunks) * self.kv_bytes_per_token,
            longest_kv_bytes=max(self._seen(start) for start, _ in chunks) * self.kv_bytes_per_token,
            linear_flops=tokens * self._linear,
            attention_flops=pairs * self._per_pair,
            head_flops=num_sampled * self._head,
            sequences=num_sampled,
            steps=1.0,
        )

    # ------------------------------------------------------------------ amounts of one token

    @property
    def _active(self) -> float:
        return float(self.spec.num_active_parameters or self.spec.num_parameters or 0)

    @property
    def _head(self) -> float:
        return 2.0 * self.spec.vocab_size * self.spec.hidden_size

    @property
    def _linear(self) -> float:
        return max(0.0, 2.0 * self._active - self._head)

    @property
    def _per_pair(self) -> float:
        spec = self.spec
        return 2.0 * spec.num_layers * spec.num_heads * (spec.key_dim + spec.value_dim)

    def _seen(self, context: float) -> float:
        """Tokens that a query at `context` sees, as a mean over the layers, some of which may see a window only."""
        windows = self.spec.layer_windows
        if not windows:
            return context
        return sum(context if window is None else min(context, window) for window in windows) / len(windows)

    def _read_bytes(self, tokens: float) -> float:
        """Weights read in a step of so many tokens: of a mixture, those of the experts that are hit."""
        experts, chosen = self.num_experts, self.num_experts_per_token
        total = float(self.spec.num_parameters or 0)
        if not experts or not chosen or self._active >= total:
            return self.weight_bytes
        in_experts = (total - self._active) / (1 - chosen / experts) / total
        hit = 1 - math.pow(1 - chosen / experts, tokens)
        return self.weight_bytes * min(1.0, 1 - in_experts + in_experts * hit)
