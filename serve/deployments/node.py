"""This node's address as its Ray cluster knows it: loopback for an embedded Ray, the pod's on a cluster."""

from __future__ import annotations

import ray


def node_address() -> str:
    """Where other nodes of this cluster reach this one, for the channel's sockets."""
    own = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)
