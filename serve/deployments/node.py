"""This node as its Ray cluster knows it, and how many there are."""

from __future__ import annotations

import ray


def node_address() -> str:
    """Where other nodes of this cluster reach this one, for the channel's sockets: the pod's address, say."""
    own = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)


def listening_address(host: str | None, ports: str | None) -> str:
    """For `Listener`: at `host`, or at this node's address; at one of `ports` (FIRST-LAST), or at a free one."""
    return f"tcp:{host or node_address()}:{ports or 0}"


def num_nodes() -> int:
    """Nodes that live now and can hold a replica; 1 where no cluster is joined."""
    if not ray.is_initialized():
        return 1
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()) or 1
