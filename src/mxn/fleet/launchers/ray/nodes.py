"""The nodes of a Ray cluster, as they are now."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mxn.errors import BackendError
from mxn.fleet.ray_inventory import NODE_LABEL, RACK_LABEL, RESOURCE_PREFIX, NodeReport, SeenChip, seen_here

log = logging.getLogger(__name__)

_SURVEY_S = 120.0


class Nodes:
    """Which nodes are alive, and what each of them has. A node is asked once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[SeenChip, ...]] = {}

    async def alive(self) -> dict[str, dict[str, Any]]:
        """Ray's facts of the nodes that are alive, by id."""
        nodes = await asyncio.to_thread(ray.nodes)
        return {node["NodeID"]: node for node in nodes if node["Alive"]}

    async def reports(self) -> list[NodeReport]:
        """What every node that is alive offers. A node that does not answer is left out and told of."""
        alive = await self.alive()
        offering = {node_id: node for node_id, node in alive.items() if _offered(node)}
        await asyncio.gather(*(self._ask(node_id) for node_id in offering if node_id not in self._known))
        return [
            NodeReport(
                node_id=node_id,
                name=node["Labels"].get(NODE_LABEL) or node["NodeName"] or node_id[:8],
                rack=node["Labels"].get(RACK_LABEL),
                offered=_offered(node),
                ray_gpus=node["Resources"].get("GPU", 0.0),
                chips=self._known[node_id],
            )
            for node_id, node in offering.items()
            if node_id in self._known
        ]

    async def _ask(self, node_id: str) -> None:
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = ray.remote(_survey).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
        try:
            answer: bytes = await asyncio.wait_for(asyncio.wrap_future(task.remote().future()), _SURVEY_S)
            self._known[node_id] = msgspec.msgpack.decode(answer, type=tuple[SeenChip, ...])
        except Exception as error:
            log.warning("node %s cannot say what chips it has: %s", node_id[:8], error)


def connect(address: str) -> None:
    """Joins this process to a cluster. Raises: BackendError when there is none at the address."""
    try:
        ray.init(address=address, namespace="mxn", log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:
        raise BackendError(
            f"no Ray cluster could be reached at {address}: {error}. Start one with `mxn up --ray`, or name its head "
            "as cluster.ray.address"
        ) from error


def _offered(node: dict[str, Any]) -> dict[str, float]:
    resources = node["Resources"]
    return {name.removeprefix(RESOURCE_PREFIX): n for name, n in resources.items() if name.startswith(RESOURCE_PREFIX)}


def _survey() -> bytes:
    return msgspec.msgpack.encode(seen_here())
