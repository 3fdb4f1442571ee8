from __future__ import annotations

import random

import pytest

from mxn.fleet.inventory import ChipGroup
from mxn.fleet.planner.problem import Assignment, Demand, Option, Pool, Problem
from mxn.fleet.seats import Seat, assign_seats


def _group(num_nodes: int, chips_per_node: int) -> ChipGroup:
    return ChipGroup(
        node="n", num_nodes=num_nodes, kind="k", chips_per_node=chips_per_node, memory_bytes=1.0, backends=()
    )


def _pools(group: ChipGroup) -> tuple[Pool, ...]:
    eights, rest = divmod(group.chips_per_node, 8)
    sizes = [(8, eights)] * bool(eights) + [(size, 1) for size in (4, 2, 1) if rest & size]
    return tuple(
        Pool(name=f"p{size}", kind="k", num_chips=size * many * group.num_nodes, chips_per_node=size)
        for size, many in sizes
    )


@pytest.mark.parametrize("chips_per_node", [1, 2, 3, 6, 8, 13, 16])
@pytest.mark.parametrize("seed", range(5))
def test_nodes_filled_to_the_last_slice_seat_every_replica_once(chips_per_node: int, seed: int) -> None:
    dice, group = random.Random(seed), _group(3, chips_per_node)
    pools = _pools(group)
    demands, replicas = [], {}
    for pool in pools:
        left = pool.num_chips * 8
        while left:
            slices = dice.choice([s for s in (1, 2, 4, 8, 16, 32, 64) if s <= min(left, pool.chips_per_node * 8)])
            name = f"d{len(demands)}"
            option = Option(name="o", pool=pool.name, slices=slices, capacity=1, watts=1, cost=1)
            demands.append(Demand(name=name, load=1, options=(option,)))
            replicas[name] = {"o": 1}
            left -= slices
    problem = Problem(pools=pools, demands=tuple(demands))
    seats = assign_seats(problem, {pool.name: group for pool in pools}, Assignment(replicas=replicas))
    used: dict[tuple[str, int], int] = {}
    for demand in demands:
        (seat,) = seats[demand.name, "o"]
        assert len(seat.chips) * seat.part == demand.options[0].slices
        assert seat.chips == tuple(range(seat.chips[0], seat.chips[0] + len(seat.chips)))
        for chip in seat.chips:
            used[seat.node, chip] = used.get((seat.node, chip), 0) + seat.part
    assert used == {(f"n-{node}", chip): 8 for node in range(3) for chip in range(chips_per_node)}


def test_a_seat_reads_as_node_and_chips() -> None:
    assert Seat(node="a", chips=(0, 1), part=8).text == "a:0-1"
    assert Seat(node="a", chips=(2,), part=8).text == "a:2"
    assert Seat(node="b", chips=(0,), part=2).text == "b:0 (2/8)"
