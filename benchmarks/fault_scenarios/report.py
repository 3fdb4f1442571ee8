"""What a scenario found: figures, and checks of them against what is promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One promise. value: as measured."""

    name: str
    value: float | str
    promise: str
    is_kept: bool


@dataclass(slots=True)
class Report:
    """The findings of one scenario. notes: what a reader should know besides, such as why it was not run."""

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_skipped: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether every promise was."""
        return all(check.is_kept for check in self.checks)

    def at_most(self, name: str, value: float | None, limit: float) -> None:
        """A value that must not exceed the limit; None is one that was never reached."""
        kept = value is not None and not math.isnan(value) and value <= limit
        shown = "never" if value is None else round(value, 4)
        self.checks.append(Check(name=name, value=shown, promise=f"at most {limit:g}", is_kept=kept))

    def at_least(self, name: str, value: float, limit: float) -> None:
        """A value that must reach the limit."""
        self.checks.append(
            Check(name=name, value=round(value, 4), promise=f"at least {limit:g}", is_kept=value >= limit)
        )

    def equal(self, name: str, value: float | str, wanted: float | str) -> None:
        """A value that must be just so."""
        self.checks.append(Check(name=name, value=value, promise=str(wanted), is_kept=value == wanted))

    def skip(self, why: str) -> None:
        """The scenario cannot be run here."""
        self.is_skipped = True
        self.notes.append(f"not run: {why}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Records of scenarios as a Markdown table, a line per promise."""
    lines = ["| scenario | what happens | promise | measured | |", "|---|---|---|---|---|"]
    for row in rows:
        first = [row["scenario"], row["fault"]]
        if row["is_skipped"]:
            lines.append(f"| {first[0]} | {first[1]} | | {'; '.join(row['notes'])} | not run |")
        for check in row["checks"]:
            mark = "kept" if check["is_kept"] else "**broken**"
            promise = f"{check['name']}: {check['promise']}"
            lines.append(f"| {first[0]} | {first[1]} | {promise} | {check['value']} | {mark} |")
            first = ["", ""]
    return "\n".join(lines) + "\n"
