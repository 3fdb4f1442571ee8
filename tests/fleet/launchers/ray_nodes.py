"""A Ray cluster on this machine for tests, in a process of its own: prints its address, removes nodes named on stdin.

python ray_nodes.py '{"name": ["chip kind", ...], ...}'
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

SMALL = {"num_cpus": 1, "object_store_memory": 80 << 20}


def main() -> None:
    """Starts a head without chips and a node for each name; ends all of them at the end of stdin."""
    cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
    try:
        nodes = {
            name: cluster.add_node(
                **SMALL,
                resources={f"chip:{kind}": kinds.count(kind) for kind in set(kinds)},
                labels={"mxn.io/node": name},
                env_vars={"MXN_FAKE_CHIPS": ",".join(kinds)},
            )
            for name, kinds in json.loads(sys.argv[1]).items()
        }
        print(cluster.address, flush=True)
        for line in sys.stdin:
            cluster.remove_node(nodes[line.strip()], allow_graceful=False)
            print("removed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
