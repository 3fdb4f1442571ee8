"""The host's processor as one chip: every backend that computes on it names this same chip."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

import psutil

from mxn.core.chip import Chip
from mxn.core.quantity import Provenance, Quantity

_FEATURES = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 "
    "asimd asimddp i8mm bf16 sve sve2"
)


def cpu_chip() -> Chip:
    """All cores this process may use, and the memory that is free now."""
    facts = _cpu_facts()
    return Chip(
        uid="cpu-0",
        kind=None,
        name=facts.pop("name"),
        vendor=facts.pop("vendor"),
        memory_bytes=available_memory_bytes(),
        cores=usable_cores(),
        features=tuple(facts.pop("features").split()),
        facts=facts,
    )


def usable_cores() -> int:
    """Cores this process may run on: its affinity, and no more than its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    return max(1, min(affinity, math.ceil(quota))) if quota else affinity


def available_memory_bytes() -> int:
    """Memory that can be taken now: what the host has free, and no more than the container's limit leaves."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None:
            available = min(available, max(0, limit - usage))
    return available


def resident_bytes(pid: int) -> Quantity:
    """Memory that a process and its children hold in RAM; what they reserved and never touched is not in it."""
    try:
        process = psutil.Process(pid)
        total = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    except psutil.Error as error:
        return Quantity.unavailable("B", f"process {pid} cannot be looked at: {error}")
    return Quantity(value=float(total), unit="B", provenance=Provenance.MEASURED, source="its resident set")


def peak_resident_bytes() -> float | None:
    """The most memory that this process ever held in RAM; None where the system does not tell.

    Not getrusage's figure: that one is never below what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return 1024.0 * int(found[1]) if found else None


def _cgroup_cores() -> float | None:
    """CPU time quota of the container in cores, or None when there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    old_quota = _read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    old_period = _read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return old_quota / old_period if old_quota and old_period and old_quota > 0 else None


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _cpu_facts() -> dict[str, str]:
    """Name, vendor and features of the CPU, and what else tells one from another."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = {key.strip(): value.strip() for key, value in re.findall(r"^([^:\n]+):(.*)$", text, re.MULTILINE)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    facts = {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "vendor": fields.get("vendor_id") or fields.get("CPU implementer") or "unknown",
        "features": " ".join(name for name in _FEATURES.split() if name in flags),
        "machine": platform.machine(),
        "family": fields.get("cpu family", ""),
        "model": fields.get("model", ""),
        "stepping": fields.get("stepping", ""),
        "sockets": str(len(set(re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE))) or 1),
    }
    return {key: value for key, value in facts.items() if value or key == "features"}
