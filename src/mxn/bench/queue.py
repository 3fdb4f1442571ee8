"""How long requests stand in a server's own line: from its metrics, before and after a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from mxn.engine.http_stream import ConnectionPool, TransportError

_TIMEOUT_S = 10.0
_NAMES = (
    ("mxn_engine_sequences_started_total", "mxn_engine_queue_seconds_total"),
    ("vllm:request_queue_time_seconds_count", "vllm:request_queue_time_seconds_sum"),
)
"""Of each server that tells: requests that left the line, and the seconds they stood in it."""
_MODEL_LABELS = ("model", "model_name")


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueTotals:
    """Requests that have left a server's line so far, and the seconds they had stood in it, all together."""

    num_started: float
    seconds: float

    def mean_s_until(self, later: QueueTotals) -> float | None:
        """Mean wait of the requests that left it since; None when there were none."""
        count = later.num_started - self.num_started
        return (later.seconds - self.seconds) / count if count > 0 else None


@runtime_checkable
class QueueArm(Protocol):
    """An arm that may tell how long requests wait in its line."""

    async def queue(self) -> QueueTotals | None:
        """So far, over all requests; None where the server does not tell."""


async def ask_queue(base_url: str, model: str, headers: dict[str, str]) -> QueueTotals | None:
    """The totals in a server's Prometheus metrics; None where there are none. `base_url` ends in /v1."""
    parts, address = bytearray(), urlsplit(base_url)
    pool = ConnectionPool(f"{address.scheme}://{address.netloc}{address.path.rstrip('/').removesuffix('/v1')}")
    try:
        status = await pool.exchange(
            "GET", "/metrics", headers=headers, body=b"", sink=lambda data, _: parts.extend(data), timeout_s=_TIMEOUT_S
        )
    except TransportError:  # a server that is gone shows in its answers
        return None
    finally:
        pool.close()
    return read_queue(bytes(parts).decode(errors="replace"), model) if status == 200 else None


def read_queue(text: str, model: str) -> QueueTotals | None:
    """The totals of a model in Prometheus' text format."""
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if model in (sample.labels.get(label) for label in _MODEL_LABELS):
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
    except ValueError:
        return None
    for count, seconds in _NAMES:
        if count in found and seconds in found:
            return QueueTotals(num_started=found[count], seconds=found[seconds])
    return None
