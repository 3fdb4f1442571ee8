"""What an engine counts. A plain dataclass, so that driving an engine in process needs no message library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """Gauges and counters of one engine after a step. Counters only grow.

    num_started, queue_s: sequences that left the line, and the seconds they had stood in it before, first time only.
    chip_energy_j: this engine's share of its chip's joules, of which request_energy_j went to sequences and
      idle_energy_j to nobody; None when nothing meters the chip. Only the first is known of a server's replica.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_total_blocks: int = 0
    num_steps: int = 0
    num_started: int = 0
    queue_s: float = 0.0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    step_s: float = 0.0
    busy_s: float = 0.0
    chip_energy_j: float | None = None
    request_energy_j: float | None = None
    idle_energy_j: float | None = None

    @classmethod
    def total(cls, parts: Iterable[EngineStats]) -> EngineStats:
        """Those of several engines added up; joules that none of them knows stay unknown."""
        parts = list(parts)
        total = cls()
        for field in fields(cls):
            known = [value for part in parts if (value := getattr(part, field.name)) is not None]
            if known:
                setattr(total, field.name, sum(known))
        return total
