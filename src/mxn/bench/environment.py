"""The manifest of a run: chip, versions, commit and command, read from this machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mxn.bench.records import Manifest
from mxn.energy.reader import PowerReader

_PACKAGES = ("mxn", "torch", "transformers", "tokenizers", "numpy", "onnxruntime", "triton", "uvicorn", "fastapi")
_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve",
    "i8mm", "bf16",
)  # fmt: skip
_DRIVERS = (
    ("microcode", "proc/cpuinfo", r"^microcode\s*: (\S+)"),
    ("nvidia", "proc/driver/nvidia/version", r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)?)"),
    ("amdgpu", "sys/module/amdgpu/version", r"(\S+)"),
)


def manifest(*, seed: int, readers: Sequence[PowerReader] = ()) -> Manifest:
    """What a reader needs to repeat the run."""
    name, features = cpu_name_and_features()
    return Manifest(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        commit=commit(),
        chip=name,
        num_cores=len(os.sched_getaffinity(0)),
        chip_features=features,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        platform=platform.platform(),
        versions={"python": platform.python_version(), **package_versions()},
        load_average=round(os.getloadavg()[0], 2),
        seed=seed,
        power_sources=tuple(f"{reader.name} ({reader.kind}, {reader.scope}): {reader.detail}" for reader in readers),
        power_limits_w=tuple(reader.power_limit_w for reader in readers),
        drivers=drivers(),
    )


def busy_warning(load_average: float, num_cores: int) -> str | None:
    """What to tell a user who is about to measure on a machine that is not idle; None when it is."""
    if load_average < 0.5 * num_cores:
        return None
    return f"load average {load_average:g} on {num_cores} cores before the run: other work makes figures low and noisy"


def package_versions() -> dict[str, str]:
    """Versions of the packages that bear on the figures; absent ones are left out. Imports none of them."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def drivers(root: Path = Path("/")) -> dict[str, str]:
    """Versions of the kernel, the processor's microcode and the GPU drivers that are loaded."""
    found = {"kernel": platform.release()}
    for name, path, pattern in _DRIVERS:
        try:
            said = re.search(pattern, (root / path).read_text(), re.MULTILINE)
        except OSError:
            continue
        if said is not None:
            found[name] = said[1]
    return found


def commit() -> str:
    """Commit of the checkout mxn runs from, "+ changes" when files differ, "unknown" outside a checkout."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (" + changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name_and_features() -> tuple[str, tuple[str, ...]]:
    """The CPU's name, with family and model since virtual machines often hide which one it is, and what it can do."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine(), ()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name, tuple(f for f in _FEATURES if f in flags)
