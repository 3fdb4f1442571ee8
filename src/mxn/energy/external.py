"""Meters outside the host, such as PDUs, wall meters and vendors' tools: a CSV that they write, or a command."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from mxn.core.clock import Clock, SystemClock
from mxn.energy.counter import Poller
from mxn.energy.reader import Loss, PowerReader, ReaderKind, Reading, Scope
from mxn.energy.sampled import PowerIntegrator, SampledReader
from mxn.errors import ConfigError

POLL_S = 0.5
_TIME_COLUMNS = ("time", "timestamp", "unix_time", "date")
_WATT_COLUMNS = ("watts", "power_w", "power", "w")


def external_reader(spec: str, *, scope: Scope = Scope.WALL, relative_error: float | None = None) -> PowerReader:
    """The meter that a text names: "csv:FILE" or "command:COMMAND LINE".

    Raises: ConfigError when it names none, or what it names cannot be read.
    """
    kind, separator, rest = spec.partition(":")
    if separator and kind == "csv" and rest:
        return CsvMeter(Path(rest), scope=scope, relative_error=relative_error)
    if separator and kind == "command" and rest:
        return command_reader(shlex.split(rest), scope=scope, relative_error=relative_error)
    raise ConfigError(
        f"{spec!r} is not a meter; expected csv:FILE (columns time, watts) or command:COMMAND (prints watts)"
    )


def command_reader(
    command: list[str], *, scope: Scope = Scope.WALL, period_s: float = 1.0, relative_error: float | None = None
) -> PowerReader:
    """Samples a command that prints watts as the first number on its output, such as a vendor's smi tool.

    Raises: ConfigError when it cannot be run or prints no number.
    """

    def read_watts() -> float:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * period_s, check=False)
        found = re.search(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?|nan", done.stdout, re.IGNORECASE)
        if done.returncode or found is None:
            raise ValueError(f"exit code {done.returncode}, printed {done.stdout[:80]!r}")
        return float(found.group())

    def guarded() -> float:
        try:
            return read_watts()
        except subprocess.SubprocessError as err:
            raise ValueError(str(err)) from err

    try:
        guarded()
    except (OSError, ValueError) as err:
        raise ConfigError(f"the meter command {shlex.join(command)} gives no watts: {err}") from err
    return SampledReader(
        guarded,
        name=Path(command[0]).name,
        detail=f"watts printed by {shlex.join(command)} every {period_s:g} s",
        period_s=period_s,
        relative_error=relative_error,
        scope=scope,
        kind=ReaderKind.EXTERNAL,
    )


class CsvMeter:
    """Follows a CSV file that a meter's logger appends to: a header with a time and a watts column, one row a sample.

    Times are Unix seconds or ISO dates and are brought onto the monotonic clock by what the wall clock shows when the
    reader is made: logger and host must share a clock (the same machine, or NTP).
    max_age_s: how old the newest row may be before the meter counts as gone.
    """

    kind = ReaderKind.EXTERNAL
    power_limit_w: float | None = None

    def __init__(
        self,
        path: Path,
        *,
        scope: Scope = Scope.WALL,
        relative_error: float | None = None,
        max_age_s: float = 10.0,
        clock: Clock | None = None,
        wall_s: Callable[[], float] = time.time,
        starts_thread: bool = True,
    ) -> None:
        self.name, self.scope, self.relative_error = path.name, scope, relative_error
        self._path = path
        self._clock = clock or SystemClock()
        self._offset_s = self._clock.now_s() - wall_s()
        self._integrator = PowerIntegrator(max_gap_s=max_age_s)
        self._position = 0
        self._rest = ""
        self._num_rows = 0
        self._first_s = self._last_s = 0.0
        self._lost: str | None = None
        try:
            with path.open() as file:
                columns = [c.strip().lower() for c in file.readline().split(",")]
                self._position = file.tell()
        except OSError as err:
            raise ConfigError(f"the meter file {path} cannot be read: {err}") from err
        self._time_column = _find(columns, _TIME_COLUMNS, path)
        self._watts_column = _find(columns, _WATT_COLUMNS, path)
        self._take_new_rows()
        self.update_period_s = self._measured_period_s()
        self.detail = f"watts logged to {path}, one row every {self.update_period_s:.3g} s"
        self._poller = Poller(self.read, POLL_S) if starts_thread else None

    def read(self) -> Reading:
        """Energy up to the newest row."""
        self._take_new_rows()
        reading = self._integrator.reading(self._clock.now_s())
        if self._lost and reading.energy_j is None:
            return Reading(energy_j=None, time_s=reading.time_s, reason=self._lost, loss=Loss.GONE)
        return reading

    def close(self) -> None:
        """Ends the polling thread."""
        if self._poller:
            self._poller.stop()

    def _take_new_rows(self) -> None:
        try:
            with self._path.open() as file:
                file.seek(self._position)
                text = self._rest + file.read()
                self._position = file.tell()
            self._lost = None
        except OSError as err:
            self._lost = f"{self._path}: {err}"
            return
        *rows, self._rest = text.split("\n")
        for row in rows:
            self._take_row(row)

    def _take_row(self, row: str) -> None:
        if not row.strip():
            return
        cells = row.split(",")
        try:
            at_s = _unix_s(cells[self._time_column].strip()) + self._offset_s
            watts = float(cells[self._watts_column])
            if not math.isfinite(at_s):
                raise ValueError(at_s)
        except (IndexError, ValueError):
            self._integrator.missed(f"{self._path}: {row[:80]!r} is not a sample", Loss.NOT_A_NUMBER)
            return
        self._integrator.add(watts, at_s)
        self._num_rows += 1
        self._first_s = at_s if self._num_rows == 1 else self._first_s
        self._last_s = at_s

    def _measured_period_s(self) -> float:
        """Mean time between the rows so far; a second when there are not yet two."""
        if self._num_rows < 2:
            return 1.0
        return max((self._last_s - self._first_s) / (self._num_rows - 1), 1e-3)


def _find(columns: list[str], names: tuple[str, ...], path: Path) -> int:
    for name in names:
        if name in columns:
            return columns.index(name)
    raise ConfigError(f"{path} has the columns {', '.join(columns)}; expected one of {', '.join(names)}")


def _unix_s(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
