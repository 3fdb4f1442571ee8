"""What a run of the kit found, as a table for people and as JSON for programs."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import mxn
from mxn.backends.registry import installed_backends

LEVELS = ("L0 contract", "L1 lifecycle", "L2 truth", "L3 numerics", "L4 profile")
WIDTH = 100

Status = Literal["pass", "fail", "n/a", "not run"]


class CheckFailed(Exception):
    """A check found the backend wrong; the text says what was found and what was expected."""


class NotApplicable(Exception):
    """A check has nothing to judge on this backend, with the reason. That is not a pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """One check's outcome. `detail`: what was seen, what is wrong, or why it says nothing."""

    level: int
    name: str
    status: Status
    detail: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """The result of a whole run and everything needed to run it again.

    level: the highest level of which no check failed and all were run, or -1.
    subject: backend, its distribution, the hash of its source, libraries, chip. kit: version and hash of the checks.
    models: name and hash of each model that was run. profile: what L4 measured.
    """

    level: int
    subject: dict[str, Any]
    kit: dict[str, str]
    models: dict[str, str]
    started_at: str
    seconds: float
    checks: tuple[CheckResult, ...]
    profile: dict[str, Any] | None = None

    @property
    def has_passed(self) -> bool:
        """True when every check that was asked for was run and none failed."""
        return all(check.status in ("pass", "n/a") for check in self.checks)


def reached_level(checks: Iterable[CheckResult]) -> int:
    """The highest level up to which nothing failed and nothing was left out."""
    level = -1
    for number in range(len(LEVELS)):
        statuses = [check.status for check in checks if check.level == number]
        if not statuses or not set(statuses) <= {"pass", "n/a"}:
            break
        level = number
    return level


def table(certificate: Certificate) -> str:
    """The result in at most `WIDTH` columns: one line for each check, more where it has something to say."""
    subject = certificate.subject
    lines = [f"{subject['backend']} ({subject['distribution']} {subject['version']}) on {subject['chip']}"]
    level = None
    for check in certificate.checks:
        if check.level != level:
            level = check.level
            lines += ["", LEVELS[level]]
        lines += _wrap(f"  {check.status:<7} ", f"{check.name}: {check.detail}" if check.detail else check.name)
    lines += ["", verdict(certificate)]
    return "\n".join(lines)


def verdict(certificate: Certificate) -> str:
    """One sentence: the level reached, and what kept it from more or was not judged."""
    checks = certificate.checks
    counts = {status: sum(c.status == status for c in checks) for status in ("pass", "fail", "n/a", "not run")}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    reached = LEVELS[certificate.level] if certificate.level >= 0 else "no level"
    exceptions = [c.name for c in checks if c.status == "n/a" and c.level <= certificate.level]
    suffix = f"; not judged: {'; '.join(exceptions)}" if exceptions else ""
    return "\n".join(_wrap("", f"reached {reached} ({text}){suffix}"))


def kit_facts() -> dict[str, str]:
    """Version and hash of the checks themselves."""
    return {"mxn": mxn.__version__, "sha256": _hash_sources(Path(__file__).parent), "python": platform.python_version()}


def subject_facts(name: str) -> dict[str, Any]:
    """Where a backend comes from, and the hash of its package's source."""
    entry = installed_backends()[name]
    try:
        installed = version(entry.distribution)
    except PackageNotFoundError:
        installed = "unknown"
    module = find_spec(entry.target.partition(":")[0])
    source = Path(module.origin) if module and module.origin else None
    is_package = source is not None and (source.parent / "__init__.py").is_file()
    return {
        "backend": name,
        "distribution": entry.distribution,
        "version": installed,
        "sha256": _hash_sources(source.parent if is_package else source) if source else None,
    }


def hash_files(paths: Sequence[Path]) -> str:
    """One hash over the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _hash_sources(path: Path) -> str:
    return hash_files([path] if path.is_file() else list(path.rglob("*.py")))


def _wrap(head: str, text: str) -> list[str]:
    """Text after a head, broken at spaces; the lines after the first are indented by the head's width."""
    lines, room = [""], WIDTH - len(head)
    for word in text.split():
        while len(word) > room:  # a path, say
            lines[-1:] = [lines[-1], word[:room]] if lines[-1] else [word[:room]]
            word = word[room:]
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return [(head if i == 0 else " " * len(head)) + line for i, line in enumerate(lines)]
