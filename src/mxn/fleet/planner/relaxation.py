"""The problem with divisible replicas: one linear program over all demands. Its prices start the real search."""

from __future__ import annotations

import math

import numpy as np

from mxn.fleet.planner.blocks import Goal, Instance
from mxn.fleet.planner.linear_program import Rows, Solution, Vector, solve


def relax(instance: Instance, goal: Goal, *, is_integer: bool = False, start: Vector | None = None) -> Solution:
    """Minimises the goal over divisible replicas (or whole ones). Rules about failure domains are left out.

    Columns: the items, then every demand's unserved pieces in order. Rows: the shared ones come first, so the first
    prices are theirs (at most 0 each, as HiGHS signs them).
    """
    rows, cost, upper = compact_program(instance, goal)
    whole = np.zeros(len(cost), dtype=np.bool_)
    whole[: len(instance.items)] = is_integer
    return solve(cost, upper, rows, is_integer=whole if is_integer else None, start=start, gap=1e-6)


def compact_program(instance: Instance, goal: Goal) -> tuple[Rows, Vector, Vector]:
    """Rows, costs and upper bounds of the whole problem in one program."""
    num_items, problem = len(instance.items), instance.problem
    piece_columns: list[range] = []
    slopes: list[float] = []
    lengths: list[float] = []
    for pieces in goal.pieces:
        piece_columns.append(range(num_items + len(slopes), num_items + len(slopes) + len(pieces)))
        lengths += [length for length, _ in pieces]
        slopes += [slope for _, slope in pieces]
    entries = []
    for row in range(len(instance.limits)):
        columns = np.flatnonzero(instance.use[:, row]).astype(np.int32)
        entries.append((columns, instance.use[columns, row]))
    lower, upper = [-math.inf] * len(entries), list(instance.limits)
    for index, demand in enumerate(problem.demands):
        items = instance.demand_items[index]
        if demand.load > 0:
            columns = np.concatenate([items, np.array(piece_columns[index], dtype=np.int32)])
            entries.append((columns, np.concatenate([instance.covers[items], np.ones(len(piece_columns[index]))])))
            lower.append(1.0)
            upper.append(math.inf)
        if demand.min_replicas or demand.max_replicas is not None:
            entries.append((items, np.ones(len(items))))
            lower.append(float(demand.min_replicas))
            upper.append(math.inf if demand.max_replicas is None else float(demand.max_replicas))
    lengths_of = np.array([len(columns) for columns, _ in entries])
    rows = Rows(
        np.concatenate([[0], np.cumsum(lengths_of)]).astype(np.int32),
        np.concatenate([columns for columns, _ in entries]).astype(np.int32),
        np.concatenate([values for _, values in entries]),
        np.array(lower),
        np.array(upper),
    )
    return rows, np.r_[goal.costs, slopes], np.r_[goal.uppers.astype(float), lengths]
