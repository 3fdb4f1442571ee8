"""The chips of a Ray cluster, as its nodes report them."""

from __future__ import annotations

import pytest

from mxn.backends.host import cpu_chip
from mxn.config.chip_card import load_chip_cards
from mxn.core.chip import Chip
from mxn.errors import ConfigError
from mxn.fleet.ray_inventory import GIB, NodeReport, SeenChip, offered_kinds, planned_nodes, resources_of

CARDS = load_chip_cards()


def h100(index: int) -> SeenChip:
    chip = Chip(
        uid=f"gpu-{index}",
        kind=None,
        name="NVIDIA H100 80GB HBM3",
        vendor="nvidia",
        memory_bytes=80 * GIB,
        cores=132,
    )
    return SeenChip(chip, ("cuda",))


def fake(index: int, kind: str | None) -> SeenChip:
    chip = Chip(uid=f"fake-{index}", kind=kind, name="Simulated chip", vendor="mxn", memory_bytes=GIB, cores=1)
    return SeenChip(chip, ("fake",))


def report(chips: tuple[SeenChip, ...], offered: dict[str, float], **fields: object) -> NodeReport:
    return NodeReport(node_id="0" * 56, name="n1", rack="r1", offered=offered, ray_gpus=0.0, chips=chips, **fields)  # type: ignore[arg-type]


def test_a_node_offers_chips_by_the_id_of_their_card_and_simulated_ones_only_on_demand() -> None:
    seen = [h100(0), h100(1), fake(0, "sim-a"), fake(1, None)]
    assert resources_of(seen, CARDS) == {"chip:h100-sxm": 2}
    assert resources_of(seen, CARDS, simulated=True) == {"chip:h100-sxm": 2, "chip:sim-a": 1, "chip:fake-1": 1}


def test_a_node_counts_what_it_offers_and_no_more_than_backends_see() -> None:
    [kind] = offered_kinds(report((h100(0), h100(1)), {"h100-sxm": 4}), CARDS)
    assert (kind.kind, kind.count, kind.backends, kind.uses_ray_gpus) == ("h100-sxm", 2, ("cuda",), False)
    [kind] = offered_kinds(
        report(
            (h100(0), h100(1)),
            {"h100-sxm": 1},
        ),
        CARDS,
    )
    assert kind.count == 1


def test_a_chip_that_is_offered_and_not_seen_is_refused_with_what_is_seen() -> None:
    with pytest.raises(ConfigError, match=r'offers the resource "chip:mi300x".*seen: h100-sxm'):
        list(offered_kinds(report((h100(0),), {"mi300x": 8}), CARDS))


def test_nodes_become_those_of_a_file_with_chips_that_have_a_card() -> None:
    cpu = SeenChip(cpu_chip(), ("cpu", "onnx"))
    there = report((h100(0), h100(1), fake(0, "sim-a"), cpu), {"h100-sxm": 2, "sim-a": 1})
    [node] = planned_nodes([there], CARDS)
    assert (node.name, node.rack, node.chips, node.backends) == ("n1", "r1", {"h100-sxm": 2}, ("cuda",))
