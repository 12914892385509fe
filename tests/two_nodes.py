"""A Ray cluster of two nodes on loopback, started apart from those who use it.

python two_nodes.py    prints {"address", "dashboard"}; ends, nodes and all, with its stdin
"""

import json
import logging
import os
import socket
import sys
from typing import Any

# Loopback, with a token. Ray's processes are what the tests wait for, so they are not made "nice",
# and none is started that nobody needs: one for every CPU in advance, and in every training job one
# that asks whether its node is about to be taken away.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
               "RAY_worker_niceness": "0", "RAY_prestart_worker_first_driver": "0",
               "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # fmt: skip

from ray.cluster_utils import Cluster

CPUS_PER_NODE = 6  # as Ray counts them; the tests' workers mostly wait


def main() -> None:
    """Start, report, wait, stop."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node: dict[str, Any] = {"num_cpus": CPUS_PER_NODE, "object_store_memory": 256 * 2**20}
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    logging.disable(logging.WARNING)
    cluster = Cluster(initialize_head=True, head_node_args={**node, **dashboard})
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        where = {"address": cluster.address, "dashboard": f"http://127.0.0.1:{port}"}
        print("\n" + json.dumps(where), flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
