"""Asks every backend what is there, in a child process, so that none can harm or hold up who asks.

The child asks one backend after another and prints one line for each. When a line does not come in time, or the child
dies, the backend it was at is reported as broken and a new child goes on with the rest.
"""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from mxn.backends.base import Capabilities, Probe
from mxn.backends.registry import installed_backends, load_backend
from mxn.config.environment import child_environment
from mxn.core.chip import Chip
from mxn.errors import BackendError, MxnError

TIME_LIMIT_S = 10.0
"""For one backend's import, `probe`, `chips`, `capabilities` and `power`. The contract asks for two seconds; a busy
machine takes its time."""

_START_LIMIT_S = 60.0  # a child that only has to start Python
_STARTED = b"{}"
_LONGEST_WORDS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSource:
    """What would read a chip's energy, and the cap that the chip is set to: fields as in `PowerReader`."""

    name: str
    kind: str
    scope: str
    detail: str
    power_limit_w: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SurveyedChip:
    """A chip as one backend sees it."""

    chip: Chip
    capabilities: Capabilities
    power: PowerSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What one backend says of this host. `seconds`: how long it took to say so."""

    probe: Probe
    chips: tuple[SurveyedChip, ...] = ()
    seconds: float = 0.0

    @property
    def is_scripted(self) -> bool:
        """True for simulated chips, which nothing is measured on unless asked for."""
        return bool(self.chips) and all(seen.capabilities.is_scripted for seen in self.chips)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhysicalChip:
    """One piece of silicon, however many backends reach it. Memory and power are the chip's: they count once.

    chip: as the first backend describes it, with the least memory that any of them states.
    power: the best source among theirs.
    """

    chip: Chip
    backends: tuple[str, ...]
    power: PowerSource
    notes: tuple[str, ...] = ()


def survey(names: Iterable[str] | None = None, *, time_limit_s: float = TIME_LIMIT_S) -> dict[str, Survey]:
    """Asks the named backends, or all that are installed; one that raises, hangs or dies is reported as broken."""
    waiting = list(installed_backends() if names is None else names)
    found: dict[str, Survey] = {}
    while waiting:
        with _Child(waiting, time_limit_s) as child:
            if (why := child.wait_for_start()) is not None:
                broken = Survey(probe=Probe(state="broken", reason=f"backends cannot be asked: {why}"))
                return found | dict.fromkeys(waiting, broken)
            for name in list(waiting):
                waiting.remove(name)
                answer = child.next_answer(time_limit_s)
                if isinstance(answer, Survey):
                    found[name] = answer
                    continue
                found[name] = Survey(probe=Probe(state="broken", reason=answer))
                break
    return dict(sorted(found.items()))


def physical_chips(surveys: Mapping[str, Survey]) -> tuple[PhysicalChip, ...]:
    """Chips by identity: the same `uid` through several backends is one chip."""
    sightings: dict[str, list[tuple[str, SurveyedChip]]] = {}
    for name, seen in surveys.items():
        for chip in seen.chips:
            sightings.setdefault(chip.chip.uid, []).append((name, chip))
    return tuple(_merge(seen) for seen in sightings.values())


_POWER_ORDER = ("counter", "external", "sampled", "modelled", "replay", "none")


def _merge(sightings: Sequence[tuple[str, SurveyedChip]]) -> PhysicalChip:
    names = tuple(name for name, _ in sightings)
    chips = [seen.chip for _, seen in sightings]
    least = min(chip.memory_bytes for chip in chips)
    notes = []
    if max(chip.memory_bytes for chip in chips) > 1.05 * least:
        stated = ", ".join(
            f"{name} {chip.memory_bytes / 2**30:.1f} GiB" for name, chip in zip(names, chips, strict=True)
        )
        notes.append(f"backends state different memory ({stated}); the least counts")
    power = min((seen.power for _, seen in sightings), key=lambda p: _POWER_ORDER.index(p.kind))
    return PhysicalChip(chip=replace(chips[0], memory_bytes=least), backends=names, power=power, notes=tuple(notes))


class _Child:
    """The asking process, seen from outside. A context: the process has ended when it is left."""

    def __init__(self, names: Sequence[str], time_limit_s: float) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the context is left)
        self._answers, theirs = os.pipe()
        command = [sys.executable, "-m", "mxn.backends.survey", str(theirs), str(math.ceil(2 * time_limit_s)), *names]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,  # what a plugin prints is no answer
                stderr=self._errors,
                env=child_environment(),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        self._buffer = b""

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._answers)
        self._errors.close()

    def wait_for_start(self) -> str | None:
        """None when the child has begun to ask, else why it could not."""
        line = self._read_line(_START_LIMIT_S)
        return None if line == _STARTED else self._failure(line, _START_LIMIT_S)

    def next_answer(self, time_limit_s: float) -> Survey | str:
        """What the next backend says, or why it said nothing."""
        line = self._read_line(time_limit_s)
        return msgspec.json.decode(line, type=Survey) if line else self._failure(line, time_limit_s)

    def _read_line(self, time_limit_s: float) -> bytes | None:
        """A line, b"" when the child has ended, None when the time is over."""
        deadline_s = time.monotonic() + time_limit_s
        while b"\n" not in self._buffer:
            is_readable, _, _ = select.select([self._answers], [], [], max(0.0, deadline_s - time.monotonic()))
            if not is_readable:
                return None
            received = os.read(self._answers, 65536)
            if not received:
                return b""
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failure(self, line: bytes | None, time_limit_s: float) -> str:
        if line is None:
            return f"it did not answer within {time_limit_s:g} s and was stopped; it hangs while imported or asked"
        code = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return (
            f"it ended the process that asked it ({how}): {words[-1][:_LONGEST_WORDS] if words else 'it said nothing'}"
        )


def _ask(name: str) -> Survey:
    start_s = time.monotonic()
    backend = load_backend(name)
    probe = backend.probe()
    chips = []
    for chip in backend.chips() if probe.state == "active" else ():
        reader = backend.power(chip)
        power = PowerSource(
            name=reader.name,
            kind=str(reader.kind),
            scope=str(reader.scope),
            detail=reader.detail,
            power_limit_w=reader.power_limit_w,
        )
        reader.close()
        chips.append(SurveyedChip(chip=chip, capabilities=backend.capabilities(chip), power=power))
    return Survey(probe=probe, chips=tuple(chips), seconds=time.monotonic() - start_s)


def _answer(name: str) -> bytes:
    """One backend's survey as a line, whatever it does."""
    try:
        return _checked(_ask(name))
    except MxnError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return msgspec.json.encode(Survey(probe=Probe(state="broken", reason=reason)))


def _checked(found: Survey) -> bytes:
    """The survey as a line. Raises: BackendError when its values are not the plain ones that the interface asks for."""
    try:
        line = msgspec.json.encode(found)
        same = msgspec.json.decode(line, type=Survey) == found
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise BackendError(f"what it says of itself is not plain values of the declared types: {error}") from error
    if not same:
        raise BackendError("what it says of itself changes when it is written as JSON and read back")
    return line


def main() -> None:
    """Entry point of the asking process: where to write, a time limit per backend, then names."""
    answers = os.fdopen(int(sys.argv[1]), "wb", buffering=0)
    answers.write(_STARTED + b"\n")
    for name in sys.argv[3:]:
        signal.alarm(int(sys.argv[2]))  # the system ends this process even if whoever asked is gone
        answers.write(_answer(name) + b"\n")


if __name__ == "__main__":
    main()
