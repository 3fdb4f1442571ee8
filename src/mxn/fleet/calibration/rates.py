"""What a host's processor does without a model: how fast it copies memory and multiplies matrices."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mxn.core.chip import Chip
from mxn.fleet.calibration.profile import ChipRates

_COPY_BYTES = 128 << 20
_MATRIX = 1024
_SECONDS = 1.0


def measure_rates(chip: Chip) -> ChipRates | None:
    """Rates of the host's processor, the best of about a second each; None for other chips, which no one asked yet."""
    if not chip.uid.startswith("cpu"):
        return None
    return ChipRates(copy_bytes_per_s=_copy_rate(chip.cores), matmul_flops=_matmul_rate())


def _copy_rate(cores: int) -> float:
    """Bytes read and written by all cores together, each over its own memory."""
    size = _COPY_BYTES // 8
    pairs = [(np.ones(size), np.empty(size)) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        until_s = time.monotonic() + _SECONDS
        while time.monotonic() < until_s:
            start_s = time.monotonic()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            best = max(best, 2 * _COPY_BYTES * cores / (time.monotonic() - start_s))
    return best


def _matmul_rate() -> float:
    """Operations in products of float32 matrices, by numpy's own library and threads."""
    left, right = (np.ones((_MATRIX, _MATRIX), dtype=np.float32) for _ in range(2))
    best, until_s = 0.0, time.monotonic() + _SECONDS
    while time.monotonic() < until_s:
        start_s = time.monotonic()
        left @ right
        best = max(best, 2 * _MATRIX**3 / (time.monotonic() - start_s))
    return best
