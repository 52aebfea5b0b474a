"""Where Ray Serve sends a request: to the replica whose channel already waits for it.

The gateway's pool has chosen by load and cached prefix (`serve/gateway/routing.py`), with load reports a tenth of
a second old and its own estimate of what it has sent since. Serve's router only follows.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ChosenReplicaRouter(RequestRouter):
    """Ranks the replica named by the call's `replica_id` first.

    When it is gone any other will do: it refuses the request at once with `ReplicaLost`, which is what the gateway
    needs to know, instead of waiting here for a replica that will not come back.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.kwargs.get("replica_id") if pending_request is not None else None
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        return [chosen or candidate_replicas]
