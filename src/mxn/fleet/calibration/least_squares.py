"""Non-negative least squares on relative error, and how far off it is on points it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_TOLERANCE = 1e-10


def fit_relative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> Matrix:
    """Coefficients c >= 0 that make the sum over points of (row . c / seconds - 1)² least.

    Columns may differ by many orders of magnitude; a column that is zero everywhere gets 0.
    """
    matrix = np.asarray(rows, dtype=float) / np.asarray(seconds, dtype=float)[:, None]
    scale = np.sqrt((matrix**2).sum(axis=0))
    is_used = scale > 0
    found = np.zeros(matrix.shape[1])
    found[is_used] = nnls(matrix[:, is_used] / scale[is_used], np.ones(len(matrix))) / scale[is_used]
    return found


def nnls(matrix: Matrix, target: Matrix) -> Matrix:
    """The x >= 0 that makes |matrix x - target| least.

    Source: Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    num_columns = matrix.shape[1]
    x, is_free = np.zeros(num_columns), np.zeros(num_columns, dtype=bool)
    for _ in range(10 * num_columns + 10):
        gradient = matrix.T @ (target - matrix @ x)
        candidates = np.where(is_free, -np.inf, gradient)
        entering = int(candidates.argmax())
        if candidates[entering] <= _TOLERANCE:
            break
        is_free[entering] = True
        while True:
            trial = np.zeros(num_columns)
            trial[is_free] = np.linalg.lstsq(matrix[:, is_free], target, rcond=None)[0]
            negative = is_free & (trial <= _TOLERANCE)
            if not negative.any():
                break
            steps = x[negative] / np.maximum(x[negative] - trial[negative], 1e-300)
            x = x + min(1.0, float(steps.min())) * (trial - x)
            is_free &= ~(negative & (x <= _TOLERANCE))
            x[~is_free] = 0.0
        x = trial
    return x


def left_out_errors(
    rows: Sequence[Sequence[float]],
    seconds: Sequence[float],
    groups: Sequence[object],
    fit: Callable[[Sequence[Sequence[float]], Sequence[float]], Matrix] = fit_relative,
) -> list[float]:
    """The relative error at every point, by a fit to the points of all other groups.

    Empty when there are fewer than two groups, or when the rest has fewer points than columns that are used.
    """
    errors = []
    for group in dict.fromkeys(groups):
        kept = [i for i, other in enumerate(groups) if other != group]
        left = [i for i, other in enumerate(groups) if other == group]
        if len(kept) < 2:
            return []
        found = fit([rows[i] for i in kept], [seconds[i] for i in kept])
        errors += [abs(float(np.dot(rows[i], found)) / seconds[i] - 1) for i in left]
    return errors
