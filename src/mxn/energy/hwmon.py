"""hwmon: energy counters and power sensors that kernel drivers show under /sys/class/hwmon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mxn.energy.counter import CounterReader, CounterTracker, measure_tick_s
from mxn.energy.reader import Loss, NullReader, PowerReader, Scope
from mxn.energy.sampled import SampledReader

HWMON = Path("/sys/class/hwmon")
SAMPLE_PERIOD_S = 0.05
POLL_S = 5.0


def hwmon_reader(
    driver: str,
    *,
    pci_address: str | None = None,
    labels: tuple[str, ...] = (),
    scope: Scope = Scope.DEVICE,
    root: Path = HWMON,
    settle_s: float = 0.3,
) -> PowerReader:
    """Energy of the device a driver watches, by counter where there is one, else by sampled power.

    driver: what the sensor's `name` file says, such as "amdgpu", "amd_energy", "power_meter".
    pci_address: which of several devices of that driver ("0000:c1:00.0"). labels: beginnings of the labels of the
    counters to sum; all without. Returns: a `NullReader` with the reason where nothing can be read.
    """
    folders = [f for f in sorted(root.glob("hwmon*")) if _text(f / "name") == driver]
    if pci_address is not None:
        folders = [f for f in folders if (f / "device").resolve().name == pci_address]
    if not folders:
        where = f" at {pci_address}" if pci_address else ""
        return NullReader(f"no {driver} sensor{where} under {root}")
    try:
        counters = [file for f in folders for file in sorted(f.glob("energy*_input")) if _has_label(file, labels)]
        if counters:
            return _counter(driver, counters, scope, settle_s, _limit_w(folders))
        sensors = [file for f in folders for file in _power_files(f)]
        if not sensors:
            return NullReader(f"the {driver} sensor shows neither energy nor power")
        read_watts = _sum(sensors, 1e6)
        read_watts()
    except PermissionError as err:
        hint = f"sudo chmod a+r {err.filename}"
        return NullReader(f"{driver} is there but only root may read it; to allow it: {hint}", Loss.DENIED)
    except (OSError, ValueError) as err:
        return NullReader(f"the {driver} sensor is damaged: {err}", Loss.NOT_A_NUMBER)
    return SampledReader(
        read_watts,
        name=f"hwmon-{driver}",
        detail=f"{', '.join(file.name for file in sensors)} of {driver} every {SAMPLE_PERIOD_S:g} s",
        period_s=SAMPLE_PERIOD_S,
        relative_error=None,
        scope=scope,
        power_limit_w=_limit_w(folders),
    )


def _counter(driver: str, files: list[Path], scope: Scope, settle_s: float, power_limit_w: float | None) -> PowerReader:
    tick_s = measure_tick_s(_sum(files, 1e6), longest_s=settle_s, pause_s=0)
    if tick_s is None:
        return NullReader(f"the {driver} energy counter does not move under load: not trusted", Loss.FROZEN)
    return CounterReader(
        [_sum([file], 1e6) for file in files],
        [CounterTracker(freeze_after_s=4 * POLL_S) for _ in files],
        name=f"hwmon-{driver}",
        detail=f"{len(files)} energy counters of {driver}; they tick every {1e3 * tick_s:.2g} ms",
        scope=scope,
        update_period_s=tick_s,
        power_limit_w=power_limit_w,
        poll_s=POLL_S,
    )


def _sum(files: list[Path], per_unit: float) -> Callable[[], float]:
    return lambda: sum(int(file.read_text()) for file in files) / per_unit


def _power_files(folder: Path) -> list[Path]:
    """The first power channel: the instant value where the driver shows one, else its average."""
    for name in ("power1_input", "power1_average"):
        if (folder / name).exists():
            return [folder / name]
    return []


def _has_label(file: Path, labels: tuple[str, ...]) -> bool:
    return not labels or _text(file.with_name(file.name.replace("_input", "_label"))).startswith(labels)


def _limit_w(folders: list[Path]) -> float | None:
    try:
        return sum(int((folder / "power1_cap").read_text()) for folder in folders) / 1e6
    except (OSError, ValueError):
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
