"""What commands print with: results to stdout, everything else to stderr; colours and bars on a terminal only."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from mxn import errors

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OFF_TERMINAL = 150
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_HINTS: tuple[tuple[type[errors.MxnError], str], ...] = (
    (errors.ConfigError, "mend what is named above; every command explains its options with --help"),
    (errors.DownloadError, "run the command again, it goes on where it stopped; `mxn doctor` checks disk and network"),
    (errors.UnsupportedModelError, "choose another model: `mxn models` lists those with cards"),
    (errors.ModelError, "`mxn models` lists what can be served; a hub id, a local folder or a .gguf file work too"),
    (errors.OutOfMemoryError, "give it less: --context, --kv-gib, --quantisation int8, or a smaller model"),
    (errors.UnavailableError, "start a server with `mxn serve`, or give the address of one that runs with --url"),
    (errors.BackendError, "`mxn chips` shows what is there and why a backend is not; `mxn doctor` checks the set-up"),
)


def out() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OFF_TERMINAL)


def err() -> Console:
    """The console for progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def show_error(error: errors.MxnError) -> None:
    """Prints what went wrong and what to do about it."""
    text = str(error).strip() or type(error).__name__
    hint = next((hint for kind, hint in _HINTS if isinstance(error, kind)), "`mxn doctor` checks the set-up")
    if sys.stderr.isatty():
        console = err()
        console.print("[bold red]error:[/]", end=" ")
        console.print(text, markup=False, soft_wrap=True)
        console.print("[bold]what to do:[/]", end=" ")
        console.print(hint, markup=False, soft_wrap=True)
    else:
        print(f"error: {text}\nwhat to do: {hint}", file=sys.stderr)


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]], *, mark: str = " ", width: int = 12) -> None:
    """Prints labels and texts in two columns after a mark (rich markup).

    Long texts wrap inside their column on a terminal and stay whole elsewhere.
    """
    if not console.is_terminal:
        for label, text in pairs:
            console.print(mark, end=" ")
            console.print(f"{label:<{width}} {text}", markup=False, soft_wrap=True)
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(width=width)
    grid.add_column(overflow="fold")
    for label, text in pairs:
        grid.add_row(Text.from_markup(mark), Text(label, style="dim"), Text(text))
    console.print(grid)


def show_json(value: Any) -> None:
    """Prints a value, dataclasses included, as indented JSON."""
    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def size_text(num_bytes: float | None) -> str:
    """Bytes for a person; "unknown" for None."""
    if num_bytes is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
