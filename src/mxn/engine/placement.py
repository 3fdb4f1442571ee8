"""Where sequences keep their KV: what the step scheduler asks of a cache in blocks (`paged`) or in slots (`slots`)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Protocol

from mxn.backends.base import KVCopy
from mxn.engine.sequence import Sequence


class Start(Enum):
    """What came of trying to start a sequence."""

    STARTED = auto()
    """It has its place; `num_computed_tokens` says how much of its prefix was there already."""
    WAITS = auto()
    """Another sequence is computing its prefix: those behind it may go first."""
    FULL = auto()
    """There is no room beside what running sequences were promised: nobody behind it may go first."""


Changes = tuple[bytes, bytes]
"""Heads of the hashes of blocks that became reusable, and of those that no longer are, joined."""


class Placement(Protocol):
    """Gives sequences room for their KV and finds prefixes that are there already. Rooms are blocks or slots.

    num_rooms, room_tokens: how many rooms there are, and tokens each holds.
    max_tokens: tokens of the longest sequence that fits when it is alone.
    """

    num_rooms: int
    room_tokens: int
    max_tokens: int

    @property
    def num_free(self) -> int:
        """Rooms nobody holds, those with reusable content included."""
        ...

    def root(self, cache_salt: str) -> bytes:
        """What a tenant's reusable content is filed under, so that tenants never meet."""
        ...

    def queue(self, sequence: Sequence) -> None:
        """Notes what is needed to find the sequence's prefix, once it stands in line."""
        ...

    def start(self, sequence: Sequence, num_promised: int) -> Start:
        """Gives a waiting sequence its prefix, if its whole known length fits beside `num_promised` rooms."""
        ...

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Rooms it still needs to compute its next `num_tokens` tokens; may be negative."""
        ...

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gets rooms for the next tokens; False, with nothing changed, when too few are free."""
        ...

    def commit(self, sequence: Sequence) -> None:
        """Learns that the KV of the first `num_computed_tokens` tokens is there."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Takes the sequence's rooms back. What they hold stays reusable until they are given out again."""
        ...

    def take_copies(self) -> list[KVCopy]:
        """Copies that must be made, in order, before the next step is executed."""
        ...

    def clear(self) -> None:
        """Forgets everything reusable, for example after weights or KV scales changed."""
        ...

    def report_changes(self) -> None:
        """Makes `take_changes` tell, first of all that is reusable now."""
        ...

    def take_changes(self) -> Changes | None:
        """What became or stopped being reusable since the last call; None when nothing did, or it is not told."""
        ...

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Compares the books with all living sequences. Raises: AssertionError at the first difference."""
        ...
