"""What a benchmark run found, as frozen values that go to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mxn.bench.metrics import Spread
from mxn.bench.workloads import Workload
from mxn.core.quantity import Quantity
from mxn.errors import ConfigError

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Where and with what a run was made. `load_average`: processes that wanted a core in the minute before it."""

    started: str
    command: str
    commit: str
    chip: str
    num_cores: int
    chip_features: tuple[str, ...]
    memory_gib: float
    platform: str
    versions: dict[str, str]
    load_average: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What was measured. "unknown" where a foreign server does not say; notes hold what it chose at load time."""

    label: str
    model: str
    interface: str
    backend: str = "unknown"
    attention: str = "unknown"
    quantisation: str = "unknown"
    program: str = "unknown"
    threads: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One subject on one workload over all repetitions.

    metrics: per metric of `metrics.METRIC_UNITS` the spread over repetitions.
    values: the headline of each repetition, in order.
    energy_j, mean_watts, tokens_per_watt (output tokens/J), total_tokens_per_watt (prompt + output tokens/J): over the
      time of all repetitions together, idle power included; the source names reader and scope.
    faults: requests that failed or whose tokens were not as asked, in words. A record with faults is no result.
    """

    subject: Subject
    workload: Workload
    metrics: dict[str, Spread]
    values: tuple[float, ...]
    num_output_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int | None
    energy_j: Quantity
    mean_watts: Quantity
    tokens_per_watt: Quantity
    total_tokens_per_watt: Quantity
    faults: tuple[str, ...] = ()

    @property
    def headline(self) -> Spread | None:
        """The figure the workload is run for; None when nothing succeeded."""
        return self.metrics.get(self.workload.headline)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All records of one run."""

    manifest: Manifest
    records: tuple[Record, ...]
    schema_version: int = field(default=SCHEMA_VERSION)


def save(report: Report, path: Path) -> None:
    """Writes the report as JSON; an interrupted write leaves the old file."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    part.replace(path)


def load(path: Path) -> Report:
    """Reads a report. Raises: ConfigError when the file is not one."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as err:
        raise ConfigError(f"{path} is not a benchmark report: {err}") from err
    if report.schema_version != SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema version {report.schema_version}; this mxn reads {SCHEMA_VERSION}")
    return report
