"""A Ray cluster on loopback, started apart from those who use it.

    python ray_nodes.py CPUS [CPUS ...]

One node for each number of CPUs, the first of which is the head. Prints {"address", "dashboard"}.
A line "add CPUS" on stdin adds a node, "kill NUMBER" sends SIGKILL to all processes of the node of
that place, from 0 and with those that were added, and "drain NUMBER" tells the cluster that it will
be taken away; each is answered by a line when it is done. Ends, nodes and all, with its stdin.
"""

import json
import logging
import os
import socket
import sys
import time
from typing import Any

# Loopback, with a token. Ray's processes are what the tests wait for, so they are not made "nice",
# and none is started that nobody needs: one for every CPU in advance, and in every training job one
# that asks whether its nodes are about to be taken away, unless a test wants it.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
               "RAY_worker_niceness": "0", "RAY_prestart_worker_first_driver": "0"}  # fmt: skip
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

NOTICE_S = 60


def node_arguments(cpus: str) -> dict[str, Any]:
    """Of a node with so many CPUs as Ray counts them; the tests' workers mostly wait."""
    # No port of its own choosing: there may be another cluster.
    return {"num_cpus": int(cpus), "object_store_memory": 256 * 2**20,
            "dashboard_agent_listen_port": None}  # fmt: skip


def drain(cluster: Cluster, node: Any) -> None:
    """Tell what a cloud tells before it takes a machine away."""
    deadline_ms = (int(time.time()) + NOTICE_S) * 1000
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
    client = GcsClient(address=cluster.address)
    is_accepted, why = client.drain_node(node.node_id, reason, "a test", deadline_ms)
    assert is_accepted, why


def main() -> None:
    """Start, report, obey, stop."""
    head, *others = sys.argv[1:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    logging.disable(logging.WARNING)
    cluster = Cluster(initialize_head=True, head_node_args=node_arguments(head) | dashboard)
    try:
        nodes = [cluster.head_node, *(cluster.add_node(**node_arguments(n)) for n in others)]
        cluster.wait_for_nodes()
        where = {"address": cluster.address, "dashboard": f"http://127.0.0.1:{port}"}
        print("\n" + json.dumps(where), flush=True)
        for line in sys.stdin:
            verb, number = line.split()
            if verb == "add":
                nodes.append(cluster.add_node(**node_arguments(number)))
            elif verb == "drain":
                drain(cluster, nodes[int(number)])
            else:
                cluster.remove_node(nodes[int(number)], allow_graceful=False)
            print(f"done: {line}", end="", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
