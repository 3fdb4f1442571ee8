"""What benchmarks on a GPU share: what a record is stamped with, and parts that end with a word on why they failed."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
Outcome = TypeVar("Outcome")


def stamp(device: str = "cuda") -> dict[str, Any]:
    """Chip, driver, versions, commit, command and time."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    driver = tell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else None
    return {
        "chip": torch.cuda.get_device_name() if device == "cuda" else f"none ({platform.machine()} CPU)",
        "driver": (driver or "unknown").splitlines()[0],
        "torch": torch.__version__,
        "cuda_or_hip": torch.version.cuda or torch.version.hip,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": tell("git", "rev-parse", "HEAD"),
        "command": " ".join(sys.argv),
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def tell(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class Parts:
    """Runs parts until the time is up; a part that raises is recorded, and the next one goes on."""

    def __init__(self, limit_s: float) -> None:
        self._end_s = time.monotonic() + limit_s

    def run(self, name: str, part: Callable[[], Outcome], failed: Callable[[str, str], Outcome]) -> Outcome:
        """Args: failed: makes an outcome from a name and a state."""
        if time.monotonic() > self._end_s:
            return failed(name, "not run: the time was up")
        try:
            return part()
        except Exception as fault:
            traceback.print_exc()
            return failed(name, f"failed: {type(fault).__name__}: {str(fault)[:300]}")
