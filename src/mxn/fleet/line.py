"""The waiting line of one deployment: who comes next, and until when each is willing to wait."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_RECENT_S = 30.0
_MIN_ENDED = 8


class WaitingLine(Generic[T]):
    """Entries in order of their tier, lower first, then of arrival. An entry that was moved keeps its arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._gone: set[int] = set()
        self._tiers: Counter[int] = Counter()
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    def __iter__(self) -> Iterator[T]:
        """Those who wait, in no order."""
        return (entry for _, arrival, entry in self._heap if arrival not in self._gone)

    def arrive(self) -> int:
        """A number for one that arrives now; it tells its place among those of its tier."""
        return next(self._arrivals)

    def push(self, tier: int, arrival: int, entry: T) -> None:
        """Lets one wait."""
        heapq.heappush(self._heap, (tier, arrival, entry))
        self._tiers[tier] += 1

    def remove(self, tier: int, arrival: int) -> None:
        """Takes out one that waits."""
        self._leave(tier)
        self._gone.add(arrival)
        self._drop_gone()
        if len(self._gone) > 64 and 2 * len(self._gone) > len(self._heap):
            self._heap = [item for item in self._heap if item[1] not in self._gone]
            heapq.heapify(self._heap)
            self._gone.clear()

    def first(self) -> T | None:
        """Who is next, or None."""
        return self._heap[0][2] if self._heap else None

    def last_tier(self) -> float:
        """The tier that would be served last; below all others when nobody waits."""
        return max(self._tiers, default=-math.inf)

    def last(self) -> T:
        """Who would be served last."""
        return max((item for item in self._heap if item[1] not in self._gone), key=lambda item: item[:2])[2]

    def pop(self) -> T:
        """Takes out who is next."""
        tier, _, entry = heapq.heappop(self._heap)
        self._leave(tier)
        self._drop_gone()
        return entry

    def _leave(self, tier: int) -> None:
        self._tiers[tier] -= 1
        if not self._tiers[tier]:
            del self._tiers[tier]

    def _drop_gone(self) -> None:
        """Keeps the head of the heap one that waits."""
        while self._heap and self._heap[0][1] in self._gone:
            self._gone.discard(heapq.heappop(self._heap)[1])


class Departures:
    """How fast sequences have been ending while others waited, so that a wait can be foretold."""

    def __init__(self) -> None:
        self._ended_s: deque[float] = deque(maxlen=256)

    def note(self, now_s: float) -> None:
        """One has ended."""
        self._ended_s.append(now_s)

    def clear(self) -> None:
        """Nobody waits any more; what comes later may go at another pace."""
        self._ended_s.clear()

    def wait_s(self, num_ahead: int, now_s: float) -> float | None:
        """Seconds until so many have ended, if it goes on as lately; None while too few have to tell."""
        while self._ended_s and now_s - self._ended_s[0] > _RECENT_S:
            self._ended_s.popleft()
        if len(self._ended_s) < _MIN_ENDED:
            return None
        return num_ahead * (now_s - self._ended_s[0]) / len(self._ended_s)
