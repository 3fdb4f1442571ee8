"""KV in whole-sequence slots: prefixes are copied or continued in place, running sequences stand side by side.

For chips whose attention reads one contiguous piece per sequence. Their batches are neighbouring slots, so running
sequences are kept together: a gap costs something in every step, closing it costs one copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from mxn.backends.base import KVCopy, SlotKV
from mxn.engine.placement import Start
from mxn.engine.sequence import Sequence

MIN_GAIN_TOKENS = 16
"""A prefix that another sequence is still computing is worth waiting for when it saves this many tokens."""
_STRIDE = 64


@dataclass(slots=True)
class _Slot:
    """A slot's holder, or what stays reusable in a free one: `tokens` of the tenant `root`.

    is_shared: False when what the holder computed so far was to be forgotten.
    """

    holder: Sequence | None = None
    root: bytes = b""
    tokens: list[int] = field(default_factory=list)
    last_used: int = 0
    is_shared: bool = True


class SlotPlacement:
    """Placement over whole-sequence slots; see `mxn.engine.placement.Placement`.

    fingerprint: as for `PrefixCache`. Guarantee: after `take_copies` the running sequences hold neighbouring slots.
    """

    def __init__(self, kv: SlotKV, fingerprint: str, *, prefix_cache: bool) -> None:
        self.num_rooms = kv.num_slots
        self.room_tokens = self.max_tokens = kv.max_tokens
        self._fingerprint = fingerprint
        self._reuses = prefix_cache
        self._slots = [_Slot() for _ in range(kv.num_slots)]
        self._copies: list[KVCopy] = []
        self._waits: dict[int, tuple[Sequence, int]] = {}
        self._clock = 0

    @property
    def num_free(self) -> int:
        return sum(slot.holder is None for slot in self._slots)

    def root(self, cache_salt: str) -> bytes:
        parts = (self._fingerprint.encode(), cache_salt.encode())
        return hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts)).digest()

    def queue(self, sequence: Sequence) -> None:
        """Nothing: prefixes are found by comparing tokens."""

    def start(self, sequence: Sequence, num_promised: int) -> Start:
        free = [i for i, slot in enumerate(self._slots) if slot.holder is None]
        if len(free) <= num_promised:
            return Start.FULL
        source, num_reused = self._longest_prefix(sequence)
        if self._must_wait(sequence, num_reused):
            return Start.WAITS
        slot_id = self._choose(free, source, num_reused)
        if num_reused and slot_id != source:
            self._copy(source, slot_id, num_reused)
        self._waits.pop(sequence.seq_id, None)
        self._hold(slot_id, sequence)
        sequence.num_computed_tokens = num_reused
        return Start.STARTED

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        return 0

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        return True

    def commit(self, sequence: Sequence) -> None:
        """Nothing: a holder's own `num_computed_tokens` says what its slot holds."""

    def release(self, sequence: Sequence) -> None:
        slot = self._slots[sequence.slot]
        self._clock += 1
        slot.holder, slot.root, slot.last_used = None, sequence.root, self._clock
        slot.tokens = sequence.token_ids[: sequence.num_computed_tokens] if self._reuses and slot.is_shared else []
        sequence.slot = -1
        self._waits.pop(sequence.seq_id, None)

    def take_copies(self) -> list[KVCopy]:
        self._close_gaps()
        copies, self._copies = self._copies, []
        return copies

    def clear(self) -> None:
        for slot in self._slots:
            slot.tokens, slot.is_shared = [], slot.holder is None

    def report_changes(self) -> None:
        """Nothing: slots have no blocks to report."""

    def take_changes(self) -> None:
        return None

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        holders = {sequence.slot: sequence for sequence in sequences if sequence.slot >= 0}
        for slot_id, slot in enumerate(self._slots):
            if slot.holder is not holders.get(slot_id):
                raise AssertionError(
                    f"slot {slot_id} is held by {_name(slot.holder)}, not {_name(holders.get(slot_id))}"
                )

    # ------------------------------------------------------------------ prefixes

    def _longest_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """The slot with most of the sequence's first tokens, and how many; free slots before held ones."""
        best, most = -1, 0
        if not self._reuses or not sequence.may_reuse_prefix:
            return best, most
        limit = len(sequence.token_ids) - 1  # at least one token is computed anew: its logits are needed
        for slot_id, slot in enumerate(self._slots):
            holder = slot.holder
            root, tokens = (slot.root, slot.tokens) if holder is None else (holder.root, holder.token_ids)
            known = len(tokens) if holder is None else holder.num_computed_tokens
            if root != sequence.root or not slot.is_shared or min(known, limit) < max(most, 1):
                continue
            shared = common_prefix(sequence.token_ids, tokens, min(known, limit))
            if shared > most or (shared == most and shared and holder is None):
                best, most = slot_id, shared
        return best, most

    def _must_wait(self, sequence: Sequence, num_reused: int) -> bool:
        """True while a running sequence is computing more of this one's prefix than is there."""
        if not self._reuses or not sequence.may_reuse_prefix:
            return False
        if (known := self._waits.get(sequence.seq_id)) is not None:  # compared once, not at every step
            holder, until = known
            if holder.slot >= 0 and holder.num_computed_tokens < until:
                return True
            del self._waits[sequence.seq_id]
        limit = len(sequence.token_ids) - 1
        for slot in self._slots:
            other = slot.holder
            if other is None or other.root != sequence.root or not slot.is_shared:
                continue
            coming = min(limit, len(other.token_ids))
            if other.num_computed_tokens < coming and coming >= num_reused + MIN_GAIN_TOKENS:
                shared = common_prefix(sequence.token_ids, other.token_ids, coming)
                if shared >= num_reused + MIN_GAIN_TOKENS and other.num_computed_tokens < shared:
                    self._waits[sequence.seq_id] = (other, shared)
                    return True
        return False

    # ------------------------------------------------------------------ slots

    def _choose(self, free: list[int], source: int, num_reused: int) -> int:
        """The slot to start in: the source itself when that loses little, else the one unused for longest."""
        if source in free and 2 * num_reused >= len(self._slots[source].tokens):
            return source
        return min(free, key=lambda i: (i == source, bool(self._slots[i].tokens), self._slots[i].last_used))

    def _hold(self, slot_id: int, sequence: Sequence) -> None:
        slot = self._slots[slot_id]
        slot.holder, slot.tokens, slot.is_shared = sequence, [], True
        sequence.slot = slot_id

    def _copy(self, source: int, destination: int, num_tokens: int) -> None:
        if num_tokens:
            self._copies.append(KVCopy(source=source, destination=destination, num_tokens=num_tokens))

    def _close_gaps(self) -> None:
        """Moves running sequences into the free slots among them, so that they stand side by side."""
        held = [(i, slot.holder) for i, slot in enumerate(self._slots) if slot.holder is not None]
        if not held or held[-1][0] - held[0][0] + 1 == len(held):
            return
        starts = range(len(self._slots) - len(held) + 1)
        first = min(starts, key=lambda start: self._moved_tokens(start, start + len(held)))
        inside = range(first, first + len(held))
        gaps = [i for i in inside if self._slots[i].holder is None]
        movers = [(i, sequence) for i, sequence in held if i not in inside]
        for gap, (slot_id, sequence) in zip(gaps, movers, strict=True):
            self._make_blank(gap, keep=inside)
            self._copy(slot_id, gap, sequence.num_computed_tokens)
            self._slots[gap], self._slots[slot_id] = self._slots[slot_id], _Slot()
            sequence.slot = gap

    def _moved_tokens(self, first: int, end: int) -> int:
        """Tokens to copy so that all running sequences are in slots `first` to `end`."""
        total = 0
        for slot_id, slot in enumerate(self._slots):
            if slot.holder is None:
                total += len(slot.tokens) if first <= slot_id < end else 0
            elif not first <= slot_id < end:
                total += slot.holder.num_computed_tokens
        return total

    def _make_blank(self, slot_id: int, *, keep: range) -> None:
        """Saves what a free slot holds in the free slot outside `keep` that is worth least, if that is worth less."""
        slot = self._slots[slot_id]
        others = [i for i, other in enumerate(self._slots) if other.holder is None and i not in keep]
        if not slot.tokens or not others:
            return
        target = min(others, key=lambda i: (bool(self._slots[i].tokens), self._slots[i].last_used))
        if not self._slots[target].tokens or self._slots[target].last_used < slot.last_used:
            self._copy(slot_id, target, len(slot.tokens))
            self._slots[target] = slot
            self._slots[slot_id] = _Slot()


def common_prefix(first: list[int], second: list[int], limit: int) -> int:
    """How many of the first `limit` tokens are the same in both."""
    for start in range(0, limit, _STRIDE):
        end = min(start + _STRIDE, limit)
        if first[start:end] != second[start:end]:
            return next(i for i in range(start, end) if first[i] != second[i])
    return limit


def _name(sequence: Sequence | None) -> str:
    return "nobody" if sequence is None else f"sequence {sequence.seq_id}"
