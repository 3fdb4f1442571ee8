"""What a benchmark run found, as frozen values that go to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mxn.bench.metrics import Spread
from mxn.bench.workloads import Workload
from mxn.core.quantity import Quantity
from mxn.energy.window import SourceEnergy
from mxn.errors import ConfigError, MxnError

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had fewer fields; what it lacks has defaults."""

NO_STEADY_PART = "no steady part"
"""How the warning begins that a record's runs have none; its reason follows."""

SCHEMA_FILE = Path(__file__).with_name("record.schema.json")


class DiskError(MxnError):
    """A result cannot be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Where and with what a run was made.

    load_average: processes that wanted a core in the minute before it.
    power_sources, power_limits_w: what meters the chips, in words, and the caps that they are set to.
    drivers: versions of what stands between programs and chips: kernel, microcode, a GPU's driver.
    """

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
    power_sources: tuple[str, ...] = ()
    power_limits_w: tuple[float | None, ...] = ()
    drivers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What was measured. "unknown" where a foreign server does not say; notes hold what it chose at load time.

    config: the settings that it was loaded with, as `config_of` writes them; empty where a server does not tell.
    """

    label: str
    model: str
    interface: str
    backend: str = "unknown"
    attention: str = "unknown"
    quantisation: str = "unknown"
    program: str = "unknown"
    threads: int | None = None
    notes: tuple[str, ...] = ()
    config: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One repetition: figures of all of it and of its steady part (empty, with the reason, where it has none)."""

    figures: dict[str, float]
    steady: dict[str, float] = field(default_factory=dict)
    steady_note: str = ""
    energy_j: float | None = None
    tokens_per_watt: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How far a subject's answers are from those of the reference path on the same texts.

    agreement: share of positions at which its most likely token is the reference's. mean_loglik: of the texts' tokens,
    in nats; reference_loglik the same for the reference. None where the server does not tell.
    is_passed: both within the limits of `quality`; the note says what was compared or why nothing was.
    """

    reference: str
    num_positions: int
    agreement: float | None
    mean_loglik: float | None
    reference_loglik: float | None
    is_passed: bool
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One subject on one workload over all repetitions.

    metrics: per metric of `metrics.METRIC_UNITS` the spread over repetitions; steady: the same of their steady parts.
    values: the headline of each repetition, in order; runs: all figures of each.
    energy_j, mean_watts, tokens_per_watt (output tokens/J), total_tokens_per_watt (prompt + output tokens/J) and their
      reciprocals: over the time of all repetitions together, idle power included. scope says what the joules include.
    steady_tokens_per_watt: output tokens/J of the steady parts. idle_*_w: watts before and after, with nothing running.
    power: (seconds from its begin, watts) of the last repetition; null where the meter could not say.
    errors: failed requests by kind. warnings: what a reader must know. faults: requests that failed or whose tokens
      were not as asked, in words; a record with faults is no result.
    price_per_hour: of the chips, when given; its currency is the giver's.
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
    joules_per_output_token: float | None = None
    joules_per_token: float | None = None
    scope: str = "unknown"
    sources: tuple[SourceEnergy, ...] = ()
    steady: dict[str, Spread] = field(default_factory=dict)
    steady_tokens_per_watt: Quantity | None = None
    steady_mean_watts: Quantity | None = None
    idle_before_w: Quantity | None = None
    idle_after_w: Quantity | None = None
    power: tuple[tuple[float, float | None], ...] = ()
    runs: tuple[Run, ...] = ()
    errors: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    quality: Quality | None = None
    price_per_hour: float | None = None

    @property
    def cost_per_million_tokens(self) -> float | None:
        """Price of a million output tokens at the speed of the run; None without a price or a result."""
        speed = self.metrics.get("output_tokens_per_s")
        if self.price_per_hour is None or speed is None or not speed.median:
            return None
        return self.price_per_hour / 3600 / speed.median * 1e6

    @property
    def is_result(self) -> bool:
        """True when nothing speaks against showing its figures: no faults, and the quality gate passed if it ran."""
        return not self.faults and bool(self.metrics) and (self.quality is None or self.quality.is_passed)

    @property
    def headline(self) -> Spread | None:
        """The figure the workload is run for; None when nothing succeeded."""
        return self.metrics.get(self.workload.headline)


ALL = "all"
"""Stands for a part of a skipped cell that was not looked at any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A cell of the matrix that was not measured, and why."""

    model: str
    backend: str
    quantisation: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All records of one run.

    took_turns: all subjects ran in every repetition; False where one was finished before the next began.
    """

    manifest: Manifest
    records: tuple[Record, ...]
    skipped: tuple[Skipped, ...] = ()
    took_turns: bool = True
    schema_version: int = field(default=SCHEMA_VERSION)


def config_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """`core.model.LoadSettings` as words such as "threads=2"; a backend's own options as "options.NAME=VALUE"."""
    plain = [f"{name}={value}" for name, value in settings.items() if name != "options"]
    return (*plain, *(f"options.{name}={value}" for name, value in settings.get("options", ())))


def save(report: Report, path: Path) -> None:
    """Writes the report as JSON. Raises: DiskError when it cannot; what was there before stays."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def write_whole(path: Path, data: bytes) -> None:
    """Writes all of a file or nothing. Raises: DiskError with the reason; the old file stays then."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as err:
        with suppress(OSError):
            part.unlink()
        raise DiskError(
            f"{path} cannot be written ({err.strerror or err}); the measurement is lost unless shown"
        ) from err


def load(path: Path) -> Report:
    """Reads a report. Raises: ConfigError when the file is not one."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as err:
        raise ConfigError(f"{path} is not a benchmark report: {err}") from err
    if report.schema_version not in READABLE_VERSIONS:
        raise ConfigError(
            f"{path} has schema version {report.schema_version}; "
            f"this mxn reads {' and '.join(map(str, READABLE_VERSIONS))}"
        )
    return report


def schema() -> bytes:
    """The JSON Schema of a report, as shipped in `SCHEMA_FILE`."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Report)), indent=1) + b"\n"


def contradictions(report: Report) -> list[str]:
    """Figures of a report that cannot both be true. An edited or damaged file shows itself here."""
    found = []
    for record in report.records:
        name = f"{record.subject.label}, {record.workload.name}"
        joules = record.energy_j.value
        for what, tokens, quantity in (
            ("tokens_per_watt", record.num_output_tokens, record.tokens_per_watt),
            (
                "total_tokens_per_watt",
                record.num_output_tokens + record.num_prompt_tokens,
                record.total_tokens_per_watt,
            ),
        ):
            if quantity.value is not None and joules is None:
                found.append(f"{name}: {what} without energy_j")
            elif quantity.value is not None and joules and abs(quantity.value * joules - tokens) > 0.005 * tokens:
                found.append(f"{name}: {what} x energy_j is {quantity.value * joules:.6g} tokens, not {tokens}")
        headline = record.headline
        if headline is not None and record.values and not headline.low <= headline.median <= headline.high:
            found.append(f"{name}: the median of {record.workload.headline} lies outside its range")
        if headline is not None and headline.n != len(record.values):
            found.append(f"{name}: {headline.n} repetitions, {len(record.values)} values")
    return found
