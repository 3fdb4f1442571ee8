"""What a replica yields: time to first token, time per token, requests/s within the SLO, watts.

A step reads the weights and every sequence's KV cache and computes two operations per parameter and token; time is the
sum of the parts. What each part costs comes from profiles where this machine was calibrated, else from the chip's card
and assumed shares of its rates, and everything computed with those says "uncalibrated".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mxn.config.chip_card import ChipCard
from mxn.config.demand import LengthConfig, SloConfig
from mxn.energy.reader import ReaderKind
from mxn.fleet.calibration.fitting import Calibrated, Kind, StepTimes
from mxn.fleet.fit import Fit
from mxn.fleet.work import Costs, Shape

UTILISATION = 0.8
"""Share of its time a replica is planned to be busy; the rest keeps queues short."""
_LOAD_BYTES_PER_S = 1.5e9
_START_S = 20.0
_METERS = (ReaderKind.COUNTER, ReaderKind.SAMPLED, ReaderKind.EXTERNAL)


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
    """Chips that run one replica. `num_chips` below 1 is a share of one chip.

    idle_w, full_w: of one chip without load and at its most; None when nobody knows them.
    prefill_power_share, decode_power_share: of the watts between the two, while it does nothing else.
    load_s: to load the model, None when it was never loaded here.
    """

    num_chips: float
    times: StepTimes
    idle_w: float | None
    full_w: float | None
    prefill_power_share: float
    decode_power_share: float
    load_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One replica within its SLO.

    ttft_s: at the SLO's percentile. batch: sequences decoded together. requests_per_s: capacity.
    busy_w, idle_w: of all its chips, None when nobody knows them. limited_by: what caps the capacity.
    calibration: whether its times were measured; calibration_source: with what, and the margin in them.
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
    calibration: Kind
    calibration_source: str

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
    """Times of one model on one engine, the margins of its figures added."""

    def __init__(self, shape: Shape, engine: Engine) -> None:
        self._shape, self._engine, self._times = shape, engine, engine.times

    def prefill_s(self, tokens: float) -> float:
        """To compute the KV of one prompt."""
        work = self._shape.prefill(tokens, step_tokens=self._times.step_tokens)
        return (1 + self._times.prefill_margin) * self._times.prefill.seconds(work)

    def decode_s(self, batch: float, context: float) -> float:
        """One step that gives each of `batch` sequences of so many tokens one more."""
        return (1 + self._times.decode_margin) * self._times.decode.seconds(self._shape.decode(batch, context))

    def predict(self, parts: tuple[LengthConfig, ...], slo: SloConfig, fit: Fit, max_batch: int) -> Prediction | Missed:
        """Capacity within the SLO, or the first limit that even one request at a time misses."""
        prompt = sum(part.share * part.prompt_tokens for part in parts)
        output = sum(part.share * part.output_tokens for part in parts)
        context = prompt + output / 2
        room = int(fit.kv_room_bytes // max(1.0, fit.kv_bytes_per_token * (prompt + output)))
        most, limited_by = min(max(1, room), max_batch), "memory" if room < max_batch else "max_num_seqs"
        if slo.tpot_ms is not None:
            limit_s = slo.tpot_ms / 1e3
            if self.decode_s(1, context) > limit_s:
                return Missed(limit="tpot_ms", asked=slo.tpot_ms, best=1e3 * self.decode_s(1, context))
            within = _largest(most, lambda batch: self.decode_s(batch, context) <= limit_s)
            most, limited_by = (within, "tpot_ms") if within < most else (most, limited_by)
        step_s = self.decode_s(most, context)
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
            load_s=self._engine.load_s or _START_S + self._shape.weight_bytes / _LOAD_BYTES_PER_S,
            limited_by=limited_by,
            calibration=self._times.kind,
            calibration_source=self._times.source,
        )

    def _watts(self, prefill_share: float, decode_share: float) -> tuple[float | None, float | None]:
        """Mean watts at capacity, and without load."""
        engine = self._engine
        if engine.idle_w is None or engine.full_w is None:
            return None, None
        activity = min(1.0, prefill_share * engine.prefill_power_share + decode_share * engine.decode_power_share)
        busy = engine.idle_w + max(0.0, engine.full_w - engine.idle_w) * activity
        return engine.num_chips * busy, engine.num_chips * engine.idle_w


def engine_of(card: ChipCard, quantisation: str, num_chips: float, num_layers: int) -> Engine | str:
    """An engine by the card's rates for a format, or which figure the card lacks."""
    if card.memory_bandwidth_gb_s is None:
        return f"the card of {card.id} has no memory bandwidth"
    flops = _flops(card, quantisation)
    if flops is None:
        return f"the card of {card.id} has no rate that {quantisation} could be computed at"
    rates = assumed_rates(card)
    per_byte = 1 / (card.memory_bandwidth_gb_s.value * 1e9 * num_chips * rates.bandwidth_share)
    per_flop = 1 / (flops * num_chips * rates.compute_share)
    exchanges = 2 * num_layers if num_chips > 1 else 0
    costs = Costs(
        weight_bytes=per_byte,
        kv_bytes=per_byte,
        linear_flops=per_flop,
        attention_flops=per_flop,
        head_flops=per_flop,
        steps=rates.step_s + exchanges * rates.layer_exchange_s,
    )
    return Engine(
        num_chips=num_chips,
        times=StepTimes(prefill=costs, decode=costs, kind="uncalibrated", source=rates.source),
        idle_w=card_idle_w(card),
        full_w=card.tdp_w.value if card.tdp_w else None,
        prefill_power_share=rates.prefill_power_share,
        decode_power_share=rates.decode_power_share,
    )


def calibrated_engine(found: Calibrated, card: ChipCard | None, num_chips: float) -> Engine:
    """An engine by what was measured; a share of a chip takes so much longer. Watts nobody metered are the card's.

    num_chips: at most 1, since profiles are of one chip.
    """
    rates = assumed_rates(card) if card else UNCALIBRATED_CPU
    idle_w, full_w = found.power.idle_w, found.power.busy_w
    is_metered = found.power.kind in _METERS and idle_w is not None and full_w is not None
    if not is_metered:
        idle_w, full_w = card_idle_w(card) if card else None, card.tdp_w.value if card and card.tdp_w else None
    times = found.times
    return Engine(
        num_chips=num_chips,
        times=replace(times, prefill=_slowed(times.prefill, num_chips), decode=_slowed(times.decode, num_chips)),
        idle_w=idle_w,
        full_w=full_w,
        prefill_power_share=rates.prefill_power_share,
        decode_power_share=1.0 if is_metered else rates.decode_power_share,
        load_s=found.load_s,
    )


def assumed_rates(card: ChipCard) -> Rates:
    """The shares assumed for a card's chip."""
    return UNCALIBRATED_CPU if card.kind == "cpu" else UNCALIBRATED_GPU


def card_idle_w(card: ChipCard) -> float | None:
    """Watts without load: the card's, or the assumed share of its TDP; None when it knows neither."""
    if card.idle_w is not None or card.tdp_w is None:
        return card.idle_w.value if card.idle_w else None
    return assumed_rates(card).idle_share * card.tdp_w.value


def _slowed(costs: Costs, share: float) -> Costs:
    """Costs on a share of the chip: all but what a step takes beside its work."""
    return Costs(
        weight_bytes=costs.weight_bytes / share,
        kv_bytes=costs.kv_bytes / share,
        longest_kv_bytes=costs.longest_kv_bytes / share,
        linear_flops=costs.linear_flops / share,
        attention_flops=costs.attention_flops / share,
        head_flops=costs.head_flops / share,
        sequences=costs.sequences / share,
        steps=costs.steps,
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
