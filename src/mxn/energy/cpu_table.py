"""Power of CPU families when nothing measures it: idle and full-load watts per hardware thread, each with its source.

A virtual machine often hides the CPU's name, but not its CPUID vendor, family and model, so those are the key. A row
stands for the largest common part of the family: its TDP divided by its hardware threads, because a guest's core is one
hardware thread as a rule. Real packages draw 0.5 to 1.35 of their TDP at full load, hence "within a factor of two".
"""

from __future__ import annotations

from dataclasses import dataclass

IDLE_SHARE = 0.25
"""Idle watts as a share of a socket's full-load watts; assumed, not measured: part of the factor of two."""

_TDP = "codecarbon cpu_power.csv, commit b05965e4"


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuPower:
    """Watts of one visible hardware thread. `relative_error`: 1.0 means within a factor of two."""

    family: str
    idle_w: float
    max_w: float
    source: str
    relative_error: float


# (vendor, CPUID family, CPUID model or Arm part): (family name, reference part, TDP in watts, hardware threads, source)
_ROWS: dict[tuple[str, int, int], tuple[str, str, float, int, str]] = {
    ("GenuineIntel", 6, 63): ("Haswell-EP", "Xeon E5-2699 v3", 145, 36, _TDP),
    ("GenuineIntel", 6, 79): ("Broadwell-EP", "Xeon E5-2699 v4", 145, 44, _TDP),
    ("GenuineIntel", 6, 85): ("Skylake-SP / Cascade Lake", "Xeon Platinum 8280", 205, 56, _TDP),
    ("GenuineIntel", 6, 94): ("Skylake desktop", "Core i7-6700", 65, 8, _TDP),
    ("GenuineIntel", 6, 106): ("Ice Lake-SP", "Xeon Platinum 8380", 270, 80, _TDP),
    ("GenuineIntel", 6, 143): ("Sapphire Rapids", "Xeon Platinum 8480+", 350, 112, _TDP),
    ("GenuineIntel", 6, 158): ("Coffee Lake", "Core i9-9900K", 95, 16, _TDP),
    ("GenuineIntel", 6, 165): ("Comet Lake", "Core i7-10700", 65, 16, _TDP),
    ("GenuineIntel", 6, 170): ("Meteor Lake", "Core Ultra 7 155H", 28, 22, _TDP),
    ("GenuineIntel", 6, 173): ("Granite Rapids", "Xeon 6980P", 500, 256, _TDP),
    ("GenuineIntel", 6, 175): ("Sierra Forest", "Xeon 6780E", 330, 144, _TDP),
    ("GenuineIntel", 6, 183): ("Raptor Lake", "Core i9-13900K", 125, 32, _TDP),
    ("GenuineIntel", 6, 207): ("Emerald Rapids", "Xeon Platinum 8592+", 350, 128, _TDP),
    ("AuthenticAMD", 23, 1): ("Naples / Zen", "EPYC 7601", 180, 64, _TDP),
    ("AuthenticAMD", 23, 49): ("Rome / Zen 2", "EPYC 7742", 225, 128, _TDP),
    ("AuthenticAMD", 25, 1): ("Milan / Zen 3", "EPYC 7763", 280, 128, _TDP),
    ("AuthenticAMD", 25, 17): ("Genoa / Zen 4", "EPYC 9654", 360, 192, _TDP),
    ("AuthenticAMD", 25, 33): ("Vermeer / Zen 3 desktop", "Ryzen 9 5950X", 105, 32, _TDP),
    ("AuthenticAMD", 25, 97): ("Raphael / Zen 4 desktop", "Ryzen 9 7950X", 170, 32, _TDP),
    ("AuthenticAMD", 25, 160): ("Bergamo / Zen 4c", "EPYC 9754", 360, 256, _TDP),
    ("AuthenticAMD", 26, 2): ("Turin / Zen 5", "EPYC 9755", 500, 256, _TDP),
    ("AuthenticAMD", 26, 17): ("Turin Dense / Zen 5c", "EPYC 9965", 500, 384, _TDP),
    ("AuthenticAMD", 26, 68): ("Granite Ridge / Zen 5 desktop", "Ryzen 9 9950X", 170, 32, _TDP),
}


def cpu_power(vendor: str, family: int, model: int) -> CpuPower:
    """The row for a CPU, or the middle of the table with a wider error when the CPU is not in it."""
    row = _ROWS.get((vendor, family, model))
    if row is None:
        per_thread = sorted(tdp_w / threads for _, _, tdp_w, threads, _ in _ROWS.values())
        max_w = per_thread[len(per_thread) // 2]
        return CpuPower(
            family=f"unlisted {vendor} family {family} model {model}",
            idle_w=IDLE_SHARE * max_w,
            max_w=max_w,
            source=f"median of {len(_ROWS)} CPU families",
            relative_error=2.0,
        )
    name, part, tdp_w, threads, source = row
    return CpuPower(
        family=name,
        idle_w=IDLE_SHARE * tdp_w / threads,
        max_w=tdp_w / threads,
        source=f"{tdp_w:g} W TDP / {threads} threads of {part} after {source}, idle share {IDLE_SHARE:g} assumed",
        relative_error=1.0,
    )
