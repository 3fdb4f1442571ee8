from __future__ import annotations

import numpy as np
import pytest

from mxn.fleet.calibration.least_squares import fit_relative, left_out_errors, nnls


def test_known_coefficients_are_found_again() -> None:
    dice = np.random.default_rng(1)
    truth = np.array([2e-10, 0.0, 5e-3, 7e-13])
    rows = dice.uniform(0.1, 1.0, (30, 4)) * [1e9, 1e6, 1.0, 1e12]
    assert fit_relative(rows.tolist(), (rows @ truth).tolist()) == pytest.approx(truth, rel=1e-6, abs=1e-12)


def test_no_coefficient_is_negative_and_the_others_are_the_best_without_it() -> None:
    dice = np.random.default_rng(2)
    for _ in range(200):
        matrix, target = dice.normal(size=(12, 5)), dice.normal(size=12)
        found = nnls(matrix, target)
        gradient = matrix.T @ (target - matrix @ found)
        assert (found >= 0).all()
        assert (gradient <= 1e-8).all()  # Kuhn-Tucker: nothing would gain by growing,
        assert np.abs(gradient[found > 0]).max(initial=0.0) < 1e-8  # and what is used is at its best


def test_small_values_count_as_much_as_large_ones() -> None:
    rows, seconds = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [1e-3, 2e-3, 10.0, 20.0]
    small, large = fit_relative(rows, seconds)
    assert small / 1e-3 == pytest.approx(large / 10.0)


def test_a_column_of_zeros_gets_no_weight() -> None:
    assert fit_relative([[1.0, 0.0], [2.0, 0.0]], [3.0, 6.0]).tolist() == pytest.approx([3.0, 0.0])


def test_columns_that_are_the_same_still_predict() -> None:
    found = fit_relative([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 1.0, 5.0]], [3.0, 4.0, 7.0])
    assert found[0] + found[1] == pytest.approx(2.0)
    assert found[2] == pytest.approx(1.0)


def test_a_point_left_out_is_predicted_by_the_others() -> None:
    errors = left_out_errors([[1.0], [2.0], [3.0], [4.0]], [1.0, 2.0, 3.0, 8.0], [0, 1, 2, 3])
    assert errors[3] == pytest.approx(0.5)  # the first three say one second for each
    assert left_out_errors([[1.0], [2.0]], [1.0, 2.0], ["same", "same"]) == []
