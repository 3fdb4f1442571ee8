"""Progress of slow phases: bars on a terminal, one line per finished phase elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Phases:
    """Shows phases as they come; a phase ends at 1.0 or when another begins. Call it with (phase, fraction, detail).

    quiet: shows nothing; for --json.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._is_bar = sys.stderr.isatty() and not quiet
        self._is_quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started_s: dict[str, float] = {}
        self._open: str | None = None
        self._finished: set[str] = set()

    def __enter__(self) -> Phases:
        if self._is_bar:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            from mxn.cli.console import err

            self._bars = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}"),
                console=err(),
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, phase: str, fraction: float, detail: str = "") -> None:
        """Notes that `fraction` (0 to 1) of `phase` is done."""
        if not phase or (fraction >= 1.0 and phase in self._finished):
            return
        if phase != self._open:
            self._close()
            self._open = phase
            self._started_s[phase] = time.monotonic()
            self._finished.discard(phase)
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=1.0, detail=detail)
            self._bars.update(self._tasks[phase], completed=min(max(fraction, 0.0), 1.0), detail=detail)
        if fraction >= 1.0:
            self._close(detail)

    def _close(self, detail: str = "") -> None:
        phase, self._open = self._open, None
        if phase is None:
            return
        self._finished.add(phase)
        if self._bars is not None:
            self._bars.update(self._tasks[phase], completed=1.0)
            self._bars.stop_task(self._tasks[phase])
        elif not self._is_quiet:
            seconds = time.monotonic() - self._started_s[phase]
            print(f"{phase}: {seconds:.1f} s{f' ({detail})' if detail else ''}", file=sys.stderr, flush=True)
