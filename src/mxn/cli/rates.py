"""Speeds and watts of a fleet out of counters that a server tells every so often."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WINDOW_S = 10.0
"""How far back a rate looks: an idle replica books its energy every 5 s only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Of one replica, or of several together; what is not known is None.

    watts: of those that are metered. has_unmetered: some are not, so that tokens per watt are not known.
    """

    output_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    watts: float | None = None
    has_unmetered: bool = False

    @property
    def tokens_per_watt(self) -> float | None:
        """(Output tokens/s)/W, the same number as output tokens per joule."""
        if self.has_unmetered or not self.watts or self.output_tokens_per_s is None:
            return None
        return self.output_tokens_per_s / self.watts

    @classmethod
    def total(cls, parts: Iterable[Rate]) -> Rate:
        """Those of several replicas added up."""
        parts = list(parts)
        return cls(
            output_tokens_per_s=_sum(part.output_tokens_per_s for part in parts),
            prompt_tokens_per_s=_sum(part.prompt_tokens_per_s for part in parts),
            watts=_sum(part.watts for part in parts),
            has_unmetered=any(part.has_unmetered for part in parts),
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    num_output_tokens: int
    num_prompt_tokens: int
    energy_j: float | None


class Rates:
    """Takes `/v1/mxn/status` answers in order and tells each replica's rates over the last `WINDOW_S` seconds."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[_Sample]] = {}
        self._booked: dict[str, deque[_Sample]] = {}

    def take(self, status: Mapping[str, Any]) -> None:
        """Adds an answer."""
        now_s = status["gateway"]["now_s"]
        replicas = [replica for d in status["deployments"] for replica in d["replicas"] if replica["stats"]]
        for gone in self._samples.keys() - {replica["id"] for replica in replicas}:
            del self._samples[gone], self._booked[gone]
        for replica in replicas:
            stats = replica["stats"]
            sample = _Sample(
                now_s - replica["stats_age_s"],
                stats["num_output_tokens"],
                stats["num_prompt_tokens"],
                stats["chip_energy_j"],
            )
            samples = self._samples.setdefault(replica["id"], deque())
            booked = self._booked.setdefault(replica["id"], deque())
            if samples and sample.num_output_tokens < samples[-1].num_output_tokens:
                samples.clear()  # a new process counts from zero
                booked.clear()
            if not samples or sample.at_s > samples[-1].at_s + 1e-3:
                samples.append(sample)
                if not booked or sample.energy_j != booked[-1].energy_j:
                    booked.append(sample)
            for kept in (samples, booked):
                while len(kept) > 2 and kept[1].at_s < now_s - WINDOW_S:
                    kept.popleft()

    def of(self, replica_id: str) -> Rate:
        """A replica's rates; nothing is known until it has been heard of twice."""
        samples = self._samples.get(replica_id)
        if samples is None or len(samples) < 2:
            return Rate()
        first, last = samples[0], samples[-1]
        seconds = last.at_s - first.at_s
        watts = self._watts(replica_id)
        return Rate(
            output_tokens_per_s=(last.num_output_tokens - first.num_output_tokens) / seconds,
            prompt_tokens_per_s=(last.num_prompt_tokens - first.num_prompt_tokens) / seconds,
            watts=watts,
            has_unmetered=watts is None,
        )

    def _watts(self, replica_id: str) -> float | None:
        """Between two bookings of energy: what a replica says of itself in between carries the joules of the last.

        None where nothing was booked for long.
        """
        first, last = self._booked[replica_id][0], self._booked[replica_id][-1]
        is_old = self._samples[replica_id][-1].at_s - last.at_s > WINDOW_S
        if first.energy_j is None or last.energy_j is None or first is last or is_old:
            return None
        return (last.energy_j - first.energy_j) / (last.at_s - first.at_s)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
