"""Who used a chip's joules: the energy of each interval split over the sequences of its steps, and what was idle.

    joules of an interval = idle watts x idle seconds + the rest, which its steps share by their seconds
    seconds of a step     = split over its sequences by what each costs, as fitted to the steps seen so far

Requests + idle = the chip's energy, whatever the fit says; the fit only decides who pays.
"""

from __future__ import annotations

from dataclasses import dataclass

from mxn.core.batch import StepBatch
from mxn.core.clock import Clock, SystemClock
from mxn.energy.reader import PowerReader, Reading

SETTLE_S = 0.25
"""Time between two readings while steps run. A sequence that ends in between is charged at the last known watts."""

_GAP_S = 0.01
_FORGET = 0.999
_FIT_EVERY = 64
_NUM_TERMS = 4


class StepCost:
    """Seconds of a step as a sum of what is in it: a constant, prefill tokens, attention work and decode rows.

    Non-negative least squares over the steps seen, older ones forgotten slowly; before `_FIT_EVERY` steps, every token
    costs the same. Attention work of a sequence: its new tokens times the mean context that they attend to.
    """

    def __init__(self) -> None:
        self.constant_s, self.prefill_s, self.attention_s, self.decode_s = 0.0, 1.0, 0.0, 1.0
        self._products = [0.0] * (_NUM_TERMS * _NUM_TERMS)
        self._targets = [0.0] * _NUM_TERMS
        self._num_seen = 0

    def observe(self, seconds: float, prefill_tokens: float, attention: float, decode_rows: float) -> None:
        """Takes one step into the fit."""
        terms = (1.0, prefill_tokens, attention, decode_rows)
        products, targets = self._products, self._targets
        for i in range(_NUM_TERMS):
            a = terms[i]
            targets[i] = _FORGET * targets[i] + a * seconds
            for j in range(i, _NUM_TERMS):
                k = i * _NUM_TERMS + j
                products[k] = _FORGET * products[k] + a * terms[j]
        self._num_seen += 1
        if self._num_seen % _FIT_EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        """Coordinate descent from the last solution, each coefficient held at 0 or above."""
        is_first = self._num_seen == _FIT_EVERY
        found = [0.0] * _NUM_TERMS if is_first else [self.constant_s, self.prefill_s, self.attention_s, self.decode_s]
        products, targets = self._products, self._targets
        rows = [[products[min(i, j) * _NUM_TERMS + max(i, j)] for j in range(_NUM_TERMS)] for i in range(_NUM_TERMS)]
        for _ in range(200 if is_first else 40):
            for i, row in enumerate(rows):
                if row[i] > 0:
                    others = sum(row[j] * found[j] for j in range(_NUM_TERMS) if j != i)
                    found[i] = max(0.0, (targets[i] - others) / row[i])
        if any(found):
            self.constant_s, self.prefill_s, self.attention_s, self.decode_s = found


@dataclass(slots=True)
class LedgerTotals:
    """Joules so far: of the chip, charged to sequences, idle. lost_s: seconds during which the source could not say."""

    chip_j: float = 0.0
    requests_j: float = 0.0
    idle_j: float = 0.0
    lost_s: float = 0.0


class ChipMeter:
    """The joules of a chip, of which `share` count here, from one look to the next."""

    def __init__(self, reader: PowerReader, *, share: float = 1.0) -> None:
        self.reader = reader
        self.share = share
        self._last: Reading = reader.read()

    def advance(self) -> float | None:
        """Joules since the last call; None when the source cannot say."""
        last, now = self._last, self.reader.read()
        self._last = now
        if last.energy_j is None or now.energy_j is None or last.num_breaks != now.num_breaks:
            return None
        return self.share * (now.energy_j - last.energy_j)


class StepLedger:
    """Charges one chip's energy to the sequences of one engine. One thread calls it.

    chip_share: the share of the chip's energy that this engine answers for, when several run on the chip.
    """

    def __init__(self, reader: PowerReader, *, chip_share: float = 1.0, clock: Clock | None = None) -> None:
        self.reader = reader
        self.cost = StepCost()
        self.totals = LedgerTotals()
        self._meter = ChipMeter(reader, share=chip_share)
        self._clock = clock or SystemClock()
        self._settled_s = self._clock.now_s()
        self._period_s = max(SETTLE_S, 2 * reader.update_period_s)
        self._step_end_s = self._settled_s
        self._busy_s = 0.0  # of this interval, finished sequences included
        self._seconds: dict[int, float] = {}  # per living sequence: its seconds of this interval
        self._joules: dict[int, float] = {}  # per living sequence: what earlier intervals charged
        self._incomplete: set[int] = set()
        self._prepaid_j = 0.0  # charged to sequences that ended since the last settlement
        self._carry_j = 0.0
        self._busy_w: float | None = None
        self._idle_w: float | None = None

    def change_share(self, chip_share: float) -> None:
        """Answers for another share of the chip's energy from now on; what was drawn until now is booked at the old."""
        self.settle()
        self._meter.share = chip_share

    def step(self, begin_s: float, end_s: float, batch: StepBatch) -> None:
        """Notes one step. A short gap since the one before was spent on it too."""
        if begin_s - self._step_end_s < _GAP_S:
            begin_s = max(self._step_end_s, self._settled_s)
        self._step_end_s = end_s
        step_s = max(end_s - begin_s, 0.0)
        cost = self.cost
        prefill_s, attention_s, decode_s = cost.prefill_s, cost.attention_s, cost.decode_s
        constant_s = cost.constant_s / max(len(batch.sequences), 1)
        prefill_tokens = decode_rows = 0
        attention = total = 0.0
        weights = []
        for one in batch.sequences:
            num = len(one.token_ids)
            work = num * (one.start + 0.5 * num)
            attention += work
            if num == 1 and one.num_output_tokens:
                decode_rows += 1
                weight = constant_s + decode_s + attention_s * work
            else:
                prefill_tokens += num
                weight = constant_s + prefill_s * num + attention_s * work
            weights.append(weight)
            total += weight
        cost.observe(end_s - begin_s, prefill_tokens, attention, decode_rows)
        seconds = self._seconds
        if total > 0:
            scale = step_s / total
            for one, weight in zip(batch.sequences, weights, strict=True):
                seconds[one.seq_id] = seconds.get(one.seq_id, 0.0) + scale * weight
            self._busy_s += step_s
        if end_s - self._settled_s >= self._period_s:
            self.settle()

    def settle(self) -> None:
        """Reads the meter and charges the interval since the last reading."""
        chip_j, now_s = self._meter.advance(), self._clock.now_s()
        elapsed_s, self._settled_s = now_s - self._settled_s, now_s
        seconds, self._seconds = self._seconds, {}
        busy_s, self._busy_s = self._busy_s, 0.0
        prepaid_j, self._prepaid_j = self._prepaid_j, 0.0
        if chip_j is None:
            self.totals.lost_s += elapsed_s
            self._incomplete.update(seconds)
            self._carry_j = 0.0
            return
        self.totals.chip_j += chip_j
        idle_j = self._idle_part(chip_j, elapsed_s, busy_s)
        rest_j = chip_j - idle_j + self._carry_j - prepaid_j
        self._carry_j = 0.0
        living_s = sum(seconds.values())
        if living_s > 0 and rest_j > 0:
            for seq_id, own_s in seconds.items():
                self._joules[seq_id] = self._joules.get(seq_id, 0.0) + rest_j * own_s / living_s
            self.totals.requests_j += rest_j
        elif busy_s > 0:
            self._carry_j = rest_j  # everyone has ended, or paid ahead: the next interval settles the difference
        else:
            idle_j += rest_j
        self.totals.idle_j += idle_j
        if busy_s > 0 and chip_j > 0:
            self._busy_w = (chip_j - idle_j) / busy_s

    def finish(self, seq_id: int) -> float | None:
        """Joules of a sequence that ends now; None when the source could not say for all of its steps."""
        wait_s = self._period_s if self._busy_w is not None else self.reader.update_period_s
        if self._clock.now_s() - self._settled_s > wait_s:
            self.settle()
        own_s = self._seconds.pop(seq_id, 0.0)
        joules = self._joules.pop(seq_id, 0.0)
        if seq_id in self._incomplete:
            self._incomplete.discard(seq_id)
            return None
        if own_s > 0:
            if self._busy_w is None:
                return None
            ahead_j = own_s * self._busy_w
            self._prepaid_j += ahead_j
            self.totals.requests_j += ahead_j
            joules += ahead_j
        return joules if joules > 0 else None

    def _idle_part(self, chip_j: float, elapsed_s: float, busy_s: float) -> float:
        """Joules of the part of an interval in which no step ran."""
        idle_s = max(elapsed_s - busy_s, 0.0)
        if idle_s <= 0 or elapsed_s <= 0:
            return 0.0
        if busy_s == 0:
            self._idle_w = chip_j / elapsed_s
            return chip_j
        mean_w = chip_j / elapsed_s
        return idle_s * (mean_w if self._idle_w is None else min(self._idle_w, mean_w))
