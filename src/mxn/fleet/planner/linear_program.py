"""HiGHS behind one function and one growing program. Deterministic: one thread, a fixed seed, limits in work first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np
from highspy.highs import _Highs as Highs  # highspy.Highs sets up callbacks too, which prints a banner to stdout
from numpy.typing import NDArray

from mxn.errors import MxnError

Vector = NDArray[np.float64]


class InfeasibleError(MxnError):
    """No values satisfy all rows, or none were found. is_proven: the search ended by itself, not by its limit."""

    def __init__(self, message: str, *, is_proven: bool = True) -> None:
        super().__init__(message)
        self.is_proven = is_proven


@dataclass(frozen=True, slots=True)
class Rows:
    """A sparse matrix by rows with bounds: row i holds entries starts[i] .. starts[i + 1] of `columns` and `values`."""

    starts: NDArray[np.int32]
    columns: NDArray[np.int32]
    values: Vector
    lower: Vector
    upper: Vector


@dataclass(frozen=True, slots=True)
class Solution:
    """values: of the columns. prices: dual of each row (only for programs without integers).

    bound: no feasible values have a smaller objective.
    """

    values: Vector
    prices: Vector
    objective: float
    bound: float


def build_rows(entries: Sequence[tuple[NDArray[np.int32], Vector]], lower: Vector, upper: Vector) -> Rows:
    """Rows from (columns, values) pairs."""
    lengths = [len(columns) for columns, _ in entries]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    if not entries:
        return Rows(starts, np.empty(0, np.int32), np.empty(0), lower, upper)
    columns = np.concatenate([columns for columns, _ in entries]).astype(np.int32)
    return Rows(starts, columns, np.concatenate([values for _, values in entries]), lower, upper)


def solve(
    cost: Vector,
    upper: Vector,
    rows: Rows,
    *,
    is_integer: NDArray[np.bool_] | None = None,
    start: Vector | None = None,
    gap: float = 1e-6,
    max_nodes: int = 20_000,
    time_limit_s: float = 60.0,
    is_plain: bool = False,
) -> Solution:
    """Minimises cost · x over 0 <= x <= upper and the rows.

    start: feasible values to begin with (integer programs). The time limit is a last resort; `max_nodes` comes first,
    so that the same input gives the same answer on a slow machine. is_plain: there is little to presolve and solutions
    are easily found, so neither takes time.
    Raises: InfeasibleError.
    """
    highs = _quiet_highs()
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(cost), len(rows.lower)
    program.col_cost_, program.col_lower_, program.col_upper_ = cost, np.zeros(len(cost)), upper
    program.row_lower_, program.row_upper_ = rows.lower, rows.upper
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_, program.a_matrix_.index_, program.a_matrix_.value_ = (
        rows.starts,
        rows.columns,
        rows.values,
    )
    has_integers = is_integer is not None and bool(is_integer.any())
    if is_integer is not None and has_integers:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        program.integrality_ = [kinds[int(flag)] for flag in is_integer]
        highs.setOptionValue("mip_rel_gap", gap)
        highs.setOptionValue("mip_max_nodes", max_nodes)
        highs.setOptionValue("time_limit", time_limit_s)
        if is_plain:
            highs.setOptionValue("mip_heuristic_effort", 0.0)
    for presolve in ("off",) if is_plain else ("choose", "off"):
        highs.setOptionValue("presolve", presolve)
        highs.passModel(program)
        if start is not None and has_integers:
            first = highspy.HighsSolution()
            first.col_value = list(start)
            highs.setSolution(first)
        highs.run()
        status, info = highs.getModelStatus(), highs.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            is_proven = status == highspy.HighsModelStatus.kInfeasible
            raise InfeasibleError(f"no solution: {highs.modelStatusToString(status)}", is_proven=is_proven)
        found = highs.getSolution()
        values, objective = np.array(found.col_value), info.objective_function_value
        if abs(float(cost @ values) - objective) <= 1e-6 * max(1.0, abs(objective)):
            break  # HiGHS 1.16 now and then loses a constant in its presolve, and its bound with it
    return Solution(
        values=values,
        prices=np.array(found.row_dual) if not has_integers else np.zeros(len(rows.lower)),
        objective=objective,
        bound=info.mip_dual_bound if has_integers else objective,
    )


class Master:
    """A linear program whose columns arrive over time; every solve starts from the basis of the one before."""

    def __init__(self, row_lower: Vector, row_upper: Vector) -> None:
        self._highs = _quiet_highs()
        self.num_rows = len(row_lower)
        empty = np.empty(0)
        for low, high in zip(row_lower, row_upper, strict=True):
            self._highs.addRow(float(low), float(high), 0, empty.astype(np.int32), empty)

    def add_column(
        self, cost: float, rows: NDArray[np.int32], values: Vector, *, upper: float = highspy.kHighsInf
    ) -> None:
        """Adds a column bounded below by 0."""
        self._highs.addCol(cost, 0.0, upper, len(rows), rows, values)

    def free_column(self, column: int, cost: float) -> None:
        """Takes the upper bound off a column, at another cost."""
        self._highs.changeColCost(column, cost)
        self._highs.changeColBounds(column, 0.0, highspy.kHighsInf)

    def change_upper(self, row: int, upper: float) -> None:
        """Gives a row that has no lower bound another upper one."""
        self._highs.changeRowBounds(row, -highspy.kHighsInf, upper)

    def solve(self) -> Solution:
        """The optimum over the columns so far. Raises: InfeasibleError."""
        self._highs.run()
        status, info = self._highs.getModelStatus(), self._highs.getInfo()
        if status != highspy.HighsModelStatus.kOptimal:
            raise InfeasibleError(f"no solution: {self._highs.modelStatusToString(status)}")
        found, objective = self._highs.getSolution(), info.objective_function_value
        return Solution(np.array(found.col_value), np.array(found.row_dual), objective, objective)


def _quiet_highs() -> Highs:
    highs = Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("random_seed", 1)
    return highs
