"""Runs the checks of a backend level by level and says what they found."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mxn.backends.registry import load_backend
from mxn.backends.survey import Survey, survey
from mxn.conformance import level0_contract, level1_lifecycle, level2_truth, level3_numerics
from mxn.conformance.level4_profile import measure_profile
from mxn.conformance.result import (
    Certificate,
    CheckFailed,
    CheckResult,
    NotApplicable,
    Status,
    hash_files,
    kit_facts,
    reached_level,
    subject_facts,
)
from mxn.conformance.subject import Subject
from mxn.conformance.tiny_models import ARCHITECTURES, write_tiny_model
from mxn.core.model import Model
from mxn.errors import MxnError

Check = Callable[[Subject], Awaitable[str]]
OnCheck = Callable[[CheckResult], None]

CHECKS: tuple[tuple[Check, ...], ...] = (
    level0_contract.CHECKS,
    level1_lifecycle.CHECKS,
    level2_truth.CHECKS,
    level3_numerics.CHECKS,
)
CHECK_LIMIT_S = 300.0
ANSWER_LIMIT_S = 10.0
_FIRST = "it can be imported and answers within its time"


def conform(
    name: str, *, levels: Sequence[int] = (0, 1, 2, 3), models: Sequence[Model] = (), on_check: OnCheck = lambda _: None
) -> Certificate:
    """Runs the checks of some levels on the first chip of a backend.

    models: run instead of the tiny ones. on_check: told of each result as it comes.
    Level 0 always runs; a level in which the backend cannot even be loaded ends the run, and the rest is "not run".
    """
    return asyncio.run(_conform(name, sorted({0, *levels}), models, on_check))


async def _conform(name: str, levels: Sequence[int], models: Sequence[Model], on_check: OnCheck) -> Certificate:
    start_s, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    results: list[CheckResult] = []

    def add(result: CheckResult) -> None:
        results.append(result)
        on_check(result)

    with tempfile.TemporaryDirectory(prefix="mxn-conform-") as folder:
        chosen = list(models) or [write_tiny_model(a, Path(folder) / a) for a in ARCHITECTURES]
        said = survey([name], time_limit_s=ANSWER_LIMIT_S)[name]
        first = _first_result(said)
        add(first)
        profile = None
        if first.status == "pass":
            profile = await _run_levels(Subject(load_backend(name), said.chips[0].chip, chosen), levels, add)
        else:
            for level, check in _planned(levels):
                add(_not_run(level, check))
        return Certificate(
            level=reached_level(results),
            subject={
                **subject_facts(name),
                "libraries": said.probe.versions,
                "chip": said.chips[0].chip.uid if said.chips else "no chip",
                "chip_name": said.chips[0].chip.name if said.chips else None,
            },
            kit=kit_facts(),
            models={model.name: hash_files(list(Path(model.folder).glob("*.safetensors"))) for model in chosen},
            started_at=started_at,
            seconds=time.monotonic() - start_s,
            checks=tuple(results),
            profile=profile,
        )


async def _run_levels(subject: Subject, levels: Sequence[int], add: OnCheck) -> dict[str, Any] | None:
    profile: dict[str, Any] | None = None
    can_load = True
    try:
        for level, check in _planned(levels):
            if not can_load:
                add(_not_run(level, check))
                continue
            result = await _run_check(level, check, subject)
            add(result)
            if check is level1_lifecycle.CHECKS[0]:
                can_load = result.status == "pass"
        if 4 in levels and can_load:
            start_s = time.monotonic()
            profile = await measure_profile(subject, subject.runnable[0])
            points = len(profile["prefill"]) + len(profile["decode"])
            add(_result(4, "a profile was measured", "pass", f"{points} points of {profile['model']}", start_s))
        return profile
    finally:
        await subject.close()


async def _run_check(level: int, check: Check, subject: Subject) -> CheckResult:
    name, start_s = _name(check), time.monotonic()
    try:
        async with asyncio.timeout(CHECK_LIMIT_S):
            return _result(level, name, "pass", await check(subject), start_s)
    except NotApplicable as reason:
        return _result(level, name, "n/a", str(reason), start_s)
    except (CheckFailed, MxnError) as reason:
        return _result(level, name, "fail", str(reason), start_s)
    except TimeoutError:
        return _result(level, name, "fail", f"no end within {CHECK_LIMIT_S:.0f} s", start_s)
    except Exception as error:  # what a backend raises in this process is its own fault
        return _result(level, name, "fail", f"{type(error).__name__}: {error}", start_s)


def _first_result(said: Survey) -> CheckResult:
    """The check that decides whether there is anything to run."""
    detail = f"{said.seconds:.1f} s" if said.probe.state == "active" else f"{said.probe.state}: {said.probe.reason}"
    if said.probe.state == "active" and not said.chips:
        detail = "it is active and reaches no chip"
    status: Status = "pass" if said.probe.state == "active" and said.chips else "fail"
    return CheckResult(level=0, name=_FIRST, status=status, detail=detail, seconds=said.seconds)


def _planned(levels: Sequence[int]) -> list[tuple[int, Check]]:
    return [(level, check) for level in levels if level < len(CHECKS) for check in CHECKS[level]]


def _not_run(level: int, check: Check) -> CheckResult:
    return CheckResult(level=level, name=_name(check), status="not run", detail="", seconds=0.0)


def _result(level: int, name: str, status: Status, detail: str, start_s: float) -> CheckResult:
    return CheckResult(level=level, name=name, status=status, detail=detail, seconds=time.monotonic() - start_s)


def _name(check: Check) -> str:
    return getattr(check, "__name__", "check").replace("_", " ")
