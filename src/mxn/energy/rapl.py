"""RAPL: the energy counters of x86 packages and their memory, read through the kernel's powercap files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mxn.energy.counter import CounterReader, CounterTracker, measure_tick_s
from mxn.energy.reader import Loss, NullReader, PowerReader, Scope

POWERCAP = Path("/sys/class/powercap")
POLL_S = 5.0
"""Well under half of the shortest known wrap (65.7 kJ, 188 s at 350 W)."""


@dataclass(frozen=True, slots=True)
class _Domain:
    name: str
    path: Path
    wrap_j: float

    def read_joules(self) -> float:
        return int((self.path / "energy_uj").read_text()) / 1e6


def rapl_reader(*, root: Path = POWERCAP, burn_s: float = 0.05) -> PowerReader:
    """A counter over all packages and their DRAM, or a `NullReader` with the reason.

    burn_s: how long one core is kept busy to see whether the counters move; in some virtual machines they do not.
    """
    try:
        domains = _domains(root)
    except PermissionError as err:
        return NullReader(
            f"RAPL is there but only root may read it ({err.filename}); to allow it: "
            f"sudo chmod a+r {root}/intel-rapl:*/energy_uj {root}/intel-rapl:*:*/energy_uj",
            Loss.DENIED,
        )
    except (OSError, ValueError) as err:
        return NullReader(f"RAPL counters are damaged: {err}", Loss.NOT_A_NUMBER)
    if not domains:
        return NullReader(f"no RAPL counters under {root} (usual in virtual machines and on non-x86 chips)")
    tick_s = 0.0
    for domain in domains:
        if domain.name.startswith("package"):
            package_tick_s = measure_tick_s(domain.read_joules, longest_s=burn_s, pause_s=0)
            if package_tick_s is None:
                reason = f"the RAPL counter {domain.name} does not move under load: not trusted"
                return NullReader(reason, Loss.FROZEN)
            tick_s = max(tick_s, package_tick_s)
    names = ", ".join(domain.name for domain in domains)
    readers: list[Callable[[], float]] = [domain.read_joules for domain in domains]
    return CounterReader(
        readers,
        [CounterTracker(wrap_j=domain.wrap_j, freeze_after_s=4 * POLL_S) for domain in domains],
        name="rapl",
        detail=f"RAPL counters {names} of the whole host, whatever runs on it; they tick every {1e3 * tick_s:.2g} ms",
        scope=Scope.DEVICE,
        update_period_s=tick_s,
        power_limit_w=_power_limit_w(domains),
        poll_s=POLL_S,
    )


def _domains(root: Path) -> list[_Domain]:
    """Packages and their DRAM. core and uncore lie inside the package, psys around it: counting them would double."""
    found: list[_Domain] = []
    for zone in sorted(root.glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        is_package = zone.name.count(":") == 1 and name.startswith("package")
        is_dram = zone.name.count(":") == 2 and name == "dram"
        if not (is_package or is_dram):
            continue
        wrap_j = int((zone / "max_energy_range_uj").read_text()) / 1e6
        if wrap_j <= 0:
            raise ValueError(f"{zone}/max_energy_range_uj is {wrap_j * 1e6:g}, expected a positive range")
        domain = _Domain(f"{name} ({zone.name})" if is_dram else name, zone, wrap_j)
        domain.read_joules()
        found.append(domain)
    return found


def _power_limit_w(domains: list[_Domain]) -> float | None:
    """The long-term limits of all packages together, None when one of them shows none."""
    total_w = 0.0
    for domain in domains:
        if domain.name.startswith("package"):
            try:
                total_w += int((domain.path / "constraint_0_power_limit_uw").read_text()) / 1e6
            except (OSError, ValueError):
                return None
    return total_w or None
