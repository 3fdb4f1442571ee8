"""Which chips of which node every replica gets: first-fit decreasing, which is exact for the sizes that there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mxn.fleet.inventory import ChipGroup
from mxn.fleet.planner.problem import SLICES_PER_CHIP, Assignment, Pool, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """One replica's chips. chips: their indices in the node. part: eighths of the one chip, 8 for whole chips."""

    node: str
    chips: tuple[int, ...]
    part: int

    @property
    def text(self) -> str:
        """`gpu-3:0-1`, or `gpu-3:0 (2/8)`."""
        first, last = self.chips[0], self.chips[-1]
        where = f"{self.node}:{first}" if first == last else f"{self.node}:{first}-{last}"
        return where if self.part == SLICES_PER_CHIP else f"{where} ({self.part}/{SLICES_PER_CHIP})"


def assign_seats(
    problem: Problem, groups: Mapping[str, ChipGroup], assignment: Assignment
) -> dict[tuple[str, str], list[Seat]]:
    """Seats of every replica by deployment and option name.

    Sizes are powers of two and so are the nodes' groups of chips. Placed largest first, one after another, every
    replica starts at a multiple of its size and crosses no group, so whatever fits by counting is seated.
    """
    waiting: dict[str, list[tuple[int, str, str, int]]] = {pool.name: [] for pool in problem.pools}
    for demand in problem.demands:
        options = {option.name: option for option in demand.options}
        for name, count in assignment.replicas[demand.name].items():
            waiting[options[name].pool].append((options[name].slices, demand.name, name, count))
    seats: dict[tuple[str, str], list[Seat]] = {}
    for pool in problem.pools:
        offset = 0
        for slices, demand_name, option, count in sorted(waiting[pool.name], key=lambda item: (-item[0], item[1:3])):
            mine = seats.setdefault((demand_name, option), [])
            for _ in range(count):
                mine.append(_seat(pool, groups[pool.name], offset, slices))
                offset += slices
    return seats


def _seat(pool: Pool, group: ChipGroup, offset: int, slices: int) -> Seat:
    """Where so many slices are that begin at an offset into the pool's."""
    eights, rest = divmod(group.chips_per_node, 8)
    per_node, first_chip = (eights, 0) if pool.chips_per_node == 8 else (1, eights * 8 + _before(rest, pool))
    chunk, inside = divmod(offset, pool.chips_per_node * SLICES_PER_CHIP)
    node, place = divmod(chunk, per_node)
    chip = first_chip + place * pool.chips_per_node + inside // SLICES_PER_CHIP
    index = group.index if group.index is not None else node if group.num_nodes > 1 else None
    return Seat(
        node=group.node if index is None else f"{group.node}-{index}",
        chips=tuple(range(chip, chip + max(1, slices // SLICES_PER_CHIP))),
        part=min(slices, SLICES_PER_CHIP),
    )


def _before(rest: int, pool: Pool) -> int:
    """Chips in the larger groups of a node's last seven, which come first."""
    return rest - rest % (2 * pool.chips_per_node)
