from __future__ import annotations

import pytest

from mxn.backends.host import cpu_chip
from mxn.config.chip_card import ChipCard
from mxn.config.cluster import BackendConfig, ClusterConfig, NodeConfig, RackConfig
from mxn.errors import ConfigError
from mxn.fleet.inventory import GIB, change_inventory, take_inventory

ACME = ChipCard.model_validate_json(
    '{"id": "acme-x1", "name": "Acme X1", "vendor": "acme", "kind": "npu",'
    ' "memory_gib": {"value": 48, "source": "data sheet", "confidence": "low"}}'
)


def test_a_chip_that_several_backends_reach_is_counted_once_and_simulated_ones_are_not() -> None:
    inventory = take_inventory(ClusterConfig())
    found = [group for group in inventory.groups if inventory.kinds[group.kind].chip.uid == "cpu-0"]
    assert len(found) == 1
    assert found[0].num_chips == 1
    assert {"cpu", "onnx"} >= {name for name in found[0].backends if name in ("cpu", "onnx")} > set()
    assert "fake" not in {name for group in inventory.groups for name in group.backends}


def test_a_card_in_the_file_describes_the_chip_that_is_here() -> None:
    card = ACME.model_copy(update={"id": "mine", "kind": "cpu", "matches": (cpu_chip().name,)})
    inventory = take_inventory(ClusterConfig(chips=(card,)))
    assert inventory.num_chips("mine") == 1
    assert inventory.kinds["mine"].is_here


def test_nodes_may_hold_several_kinds_and_chips_nobody_has() -> None:
    cluster = ClusterConfig(
        nodes=(
            NodeConfig(name="a", count=2, chips={"h100-sxm": 8, "epyc-9654": 2}, host_memory_gib=512, reserve_gib=2),
            NodeConfig(name="b", chips={"acme-x1": 4}, rack="r"),
        ),
        racks=(RackConfig(name="r", power_w=1000.0),),
        chips=(ACME,),
        backends=(BackendConfig(name="acme", chips=("acme-x1",), quantisations=("int8",)),),
    )
    inventory = take_inventory(cluster)
    memory = {group.kind: group.memory_bytes / GIB for group in inventory.groups}
    assert memory == {"h100-sxm": pytest.approx(77.6), "epyc-9654": 254, "acme-x1": 48}
    assert {kind: inventory.num_chips(kind) for kind in memory} == {"h100-sxm": 16, "epyc-9654": 4, "acme-x1": 4}
    assert {group.kind: group.backends for group in inventory.groups} == {
        "h100-sxm": ("cuda",),
        "epyc-9654": ("cpu", "onnx"),
        "acme-x1": ("acme",),
    }
    assert inventory.rack_power_w == {"r": 1000.0}


def test_chips_are_taken_from_the_last_nodes_and_leave_what_is_there() -> None:
    inventory = take_inventory(ClusterConfig(nodes=(NodeConfig(name="a", count=3, chips={"l4": 4}),)))
    fewer = change_inventory(inventory, "-5 l4")
    assert sorted((group.num_nodes, group.chips_per_node) for group in fewer.groups) == [(1, 3), (1, 4)]
    more = change_inventory(inventory, "+17 h100-sxm")
    assert sorted((g.num_nodes, g.chips_per_node) for g in more.groups if g.kind == "h100-sxm") == [(1, 1), (2, 8)]


def test_only_one_node_can_be_here() -> None:
    with pytest.raises(ConfigError, match='only one node can be "here"'):
        take_inventory(ClusterConfig(nodes=(NodeConfig(name="a"), NodeConfig(name="b"))))
