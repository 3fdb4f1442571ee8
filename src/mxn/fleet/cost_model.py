"""What a replica yields: time to first token, time per token, requests/s within the SLO, watts; from cards by formula.

A step reads the weights and every sequence's KV cache and computes two operations per parameter and token; time is the
sum of the parts, each at the share of the data sheet's rate that is reached in practice. Those shares are `Rates`: they
are guesses until a machine was calibrated, and everything computed with guesses says "uncalibrated".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mxn.config.chip_card import ChipCard
from mxn.config.demand import LengthConfig, SloConfig
from mxn.config.model_card import Architecture
from mxn.core.model import ModelSpec
from mxn.fleet.fit import Fit

UTILISATION = 0.8
"""Share of its time a replica is planned to be busy; the rest keeps queues short."""
_LOAD_BYTES_PER_S = 1.5e9
_START_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Shares of the data sheet's rates that are reached, and what a step costs beside.

    step_s: launch and host time of a step. layer_exchange_s: of one exchange between chips, twice per layer.
    idle_share: of TDP, for cards that do not know idle watts. source: where the figures come from.
    """

    bandwidth_share: float
    compute_share: float
    step_s: float
    layer_exchange_s: float
    prefill_power_share: float
    decode_power_share: float
    idle_share: float
    source: str


UNCALIBRATED_GPU = Rates(
    bandwidth_share=0.6,
    compute_share=0.45,
    step_s=2e-3,
    layer_exchange_s=15e-6,
    prefill_power_share=1.0,
    decode_power_share=0.6,
    idle_share=0.13,
    source="uncalibrated: shares assumed, not measured on this chip",
)
UNCALIBRATED_CPU = Rates(
    bandwidth_share=0.6,
    compute_share=0.3,
    step_s=3e-3,
    layer_exchange_s=0.0,
    prefill_power_share=1.0,
    decode_power_share=0.8,
    idle_share=0.25,
    source="uncalibrated: shares assumed, not measured on this chip",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Chips that run one replica. `num_chips` below 1 is a share of one chip. bytes_per_s, flops: of one chip."""

    num_chips: float
    bytes_per_s: float
    flops: float
    tdp_w: float | None
    idle_w: float | None
    rates: Rates


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One replica within its SLO.

    ttft_s: at the SLO's percentile. batch: sequences decoded together. requests_per_s: capacity.
    busy_w, idle_w: of all its chips, None when the card does not know its watts. limited_by: what caps the capacity.
    """

    ttft_s: float
    tpot_s: float
    batch: int
    requests_per_s: float
    output_tokens_per_s: float
    busy_w: float | None
    idle_w: float | None
    load_s: float
    limited_by: str

    @property
    def tokens_per_watt(self) -> float | None:
        """Output tokens per joule at capacity."""
        return self.output_tokens_per_s / self.busy_w if self.busy_w else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Missed:
    """A limit that cannot be met: what it is, what was asked, the best that can be had."""

    limit: str
    asked: float
    best: float


class CostModel:
    """Times of one model on one engine. weight_bytes: of the whole model, as quantised."""

    def __init__(self, architecture: Architecture, spec: ModelSpec, engine: Engine, weight_bytes: float) -> None:
        self._spec, self._engine, self._weight_bytes = spec, engine, weight_bytes
        self._parameters = float(spec.num_parameters or 0)
        self._active = float(spec.num_active_parameters or self._parameters)
        self._experts = (architecture.num_experts, architecture.num_experts_per_token)
        rates = engine.rates
        self._bytes_per_s = engine.bytes_per_s * engine.num_chips * rates.bandwidth_share
        self._flops = engine.flops * engine.num_chips * rates.compute_share
        exchanges = 2 * spec.num_layers if engine.num_chips > 1 else 0
        self._fixed_s = rates.step_s + exchanges * rates.layer_exchange_s

    def prefill_s(self, tokens: float) -> float:
        """To compute the KV of one prompt."""
        linear = 2 * self._active * tokens
        attention = 4 * self._spec.num_layers * self._spec.hidden_size * tokens * tokens
        return (linear + attention) / self._flops + self._read_bytes(tokens) / self._bytes_per_s + self._fixed_s

    def decode_s(self, batch: float, kv_bytes: float) -> float:
        """One step that gives each of `batch` sequences a token; kv_bytes: of one sequence, over all chips."""
        memory = (self._read_bytes(batch) + batch * kv_bytes) / self._bytes_per_s
        return memory + 2 * self._active * batch / self._flops + self._fixed_s

    def predict(self, parts: tuple[LengthConfig, ...], slo: SloConfig, fit: Fit, max_batch: int) -> Prediction | Missed:
        """Capacity within the SLO, or the first limit that even one request at a time misses."""
        prompt = sum(part.share * part.prompt_tokens for part in parts)
        output = sum(part.share * part.output_tokens for part in parts)
        chips = max(1.0, self._engine.num_chips)
        kv_bytes = fit.kv_bytes_per_token * chips * (prompt + output / 2)
        room = int(fit.kv_room_bytes // max(1.0, fit.kv_bytes_per_token * (prompt + output)))
        most, limited_by = min(max(1, room), max_batch), "memory" if room < max_batch else "max_num_seqs"
        if slo.tpot_ms is not None:
            limit_s = slo.tpot_ms / 1e3
            if self.decode_s(1, kv_bytes) > limit_s:
                return Missed(limit="tpot_ms", asked=slo.tpot_ms, best=1e3 * self.decode_s(1, kv_bytes))
            within = _largest(most, lambda batch: self.decode_s(batch, kv_bytes) <= limit_s)
            most, limited_by = (within, "tpot_ms") if within < most else (most, limited_by)
        step_s = self.decode_s(most, kv_bytes)
        prefill_s = sum(part.share * self.prefill_s(part.prompt_tokens) for part in parts)
        capacity = UTILISATION / (prefill_s + output * step_s / most)
        longest_s = self.prefill_s(_prompt_at(parts, slo.percentile)) + step_s
        tail = math.log(100 / (100 - slo.percentile))
        if slo.ttft_ms is not None:
            spare_s = slo.ttft_ms / 1e3 - longest_s
            if spare_s <= 0:
                return Missed(limit="ttft_ms", asked=slo.ttft_ms, best=1e3 * longest_s)
            # a queue for prefill of utilisation u waits u / (2 (1 - u)) prefills on average, its tail `tail` times that
            allowed = 2 * spare_s / (2 * spare_s + tail * prefill_s) / prefill_s
            capacity, limited_by = (allowed, "ttft_ms") if allowed < capacity else (capacity, limited_by)
        busy = min(0.99, capacity * prefill_s)
        wait_s = tail * prefill_s * busy / (2 * (1 - busy))
        decode_share = min(1.0, capacity * output * step_s / most)
        busy_w, idle_w = self._watts(busy, decode_share)
        return Prediction(
            ttft_s=longest_s + wait_s,
            tpot_s=step_s,
            batch=most,
            requests_per_s=capacity,
            output_tokens_per_s=capacity * output,
            busy_w=busy_w,
            idle_w=idle_w,
            load_s=_START_S + self._weight_bytes / _LOAD_BYTES_PER_S,
            limited_by=limited_by,
        )

    def _read_bytes(self, tokens: float) -> float:
        """Weights read in a step of so many tokens: of a mixture, those of the experts that are hit."""
        experts, chosen = self._experts
        if not experts or not chosen or self._active >= self._parameters:
            return self._weight_bytes
        in_experts = (self._parameters - self._active) / (1 - chosen / experts) / self._parameters
        hit = 1 - math.pow(1 - chosen / experts, tokens)
        return self._weight_bytes * min(1.0, 1 - in_experts + in_experts * hit)

    def _watts(self, prefill_share: float, decode_share: float) -> tuple[float | None, float | None]:
        """Mean watts at capacity, and without load."""
        engine, rates = self._engine, self._engine.rates
        if engine.tdp_w is None:
            return None, None
        idle = engine.idle_w if engine.idle_w is not None else rates.idle_share * engine.tdp_w
        activity = min(1.0, prefill_share * rates.prefill_power_share + decode_share * rates.decode_power_share)
        return engine.num_chips * (idle + (engine.tdp_w - idle) * activity), engine.num_chips * idle


def engine_of(card: ChipCard, quantisation: str, num_chips: float) -> Engine | str:
    """The card's rates for a format, or which figure the card lacks."""
    if card.memory_bandwidth_gb_s is None:
        return f"the card of {card.id} has no memory bandwidth"
    flops = _flops(card, quantisation)
    if flops is None:
        return f"the card of {card.id} has no rate that {quantisation} could be computed at"
    return Engine(
        num_chips=num_chips,
        bytes_per_s=card.memory_bandwidth_gb_s.value * 1e9,
        flops=flops,
        tdp_w=card.tdp_w.value if card.tdp_w else None,
        idle_w=card.idle_w.value if card.idle_w else None,
        rates=UNCALIBRATED_CPU if card.kind == "cpu" else UNCALIBRATED_GPU,
    )


def _flops(card: ChipCard, quantisation: str) -> float | None:
    """Peak rate for weights so quantised; int4, and int8 on a GPU, are computed as half precision."""
    compute = card.compute
    half = compute.bf16_tflops or compute.fp16_tflops
    if quantisation == "fp8" and compute.fp8_tflops:
        return compute.fp8_tflops.value * 1e12
    if quantisation == "int8" and card.kind == "cpu" and compute.int8_tops:
        return compute.int8_tops.value * 1e12
    if half is None:
        return None
    return half.value * 1e12 / (2 if quantisation == "fp32" else 1)


def _prompt_at(parts: tuple[LengthConfig, ...], percentile: float) -> int:
    """The prompt length that so many per cent of the requests do not exceed."""
    total = 0.0
    for part in sorted(parts, key=lambda part: part.prompt_tokens):
        total += part.share
        if 100 * total >= percentile - 1e-6:
            return part.prompt_tokens
    return max(part.prompt_tokens for part in parts)


def _largest(most: int, is_allowed: Callable[[int], bool]) -> int:
    """The largest number up to `most` that is allowed, 1 being so and every one below an allowed one too."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_allowed(middle) else (low, middle - 1)
    return low
