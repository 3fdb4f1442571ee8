"""Progress of slow phases: bars on a terminal, one line per finished phase elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Phases:
    """Shows phases as they come: call it with (phase, fraction done, detail).

    A phase ends at 1.0 or when another begins. Its time runs from the end of the one before, whenever it is first
    heard of, so that the times shown add up to the time that passed.
    quiet: shows nothing; for --json.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._is_bar = sys.stderr.isatty() and not quiet
        self._is_quiet = quiet
        self._bars: Progress | None = None
        self._bar: TaskID | None = None  # the phase that runs now, or a nameless one between two
        self._phase: str | None = None
        self._finished: set[str] = set()
        self._last_s = time.monotonic()

    def __enter__(self) -> Phases:
        self._last_s = time.monotonic()
        if self._is_bar:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            from mxn.cli.console import err

            self._bars = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}", style="dim"),
                console=err(),
            )
            self._bars.start()
            self._bar = self._bars.add_task("...", total=None, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end()
        self.finish()

    def __call__(self, phase: str, fraction: float, detail: str = "") -> None:
        """Notes that `fraction` (0 to 1) of `phase` is done."""
        if not phase or (fraction >= 1.0 and phase in self._finished):
            return
        if phase != self._phase:
            self._end()
            self._phase = phase
            self._finished.discard(phase)
        if self._bars is not None and self._bar is not None:
            done = min(max(fraction, 0.0), 1.0)
            self._bars.update(self._bar, description=phase, total=1.0, completed=done, detail=detail)
        if fraction >= 1.0:
            self._end(detail)

    def finish(self) -> None:
        """Takes the bars off the screen's bottom line; what was shown stays. Safe to call twice."""
        if self._bars is not None:
            if self._bar is not None and self._phase is None:
                self._bars.remove_task(self._bar)
            self._bars.stop()
            self._bars = self._bar = None

    def _end(self, detail: str = "") -> None:
        """Ends the running phase."""
        phase, self._phase = self._phase, None
        if phase is None:
            return
        self._finished.add(phase)
        now_s = time.monotonic()
        seconds, self._last_s = now_s - self._last_s, now_s
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=1.0)
            self._bars.stop_task(self._bar)
            self._bar = self._bars.add_task("...", total=None, detail="")
        elif not self._is_quiet:
            print(f"{phase}: {seconds:.1f} s{f' ({detail})' if detail else ''}", file=sys.stderr, flush=True)
