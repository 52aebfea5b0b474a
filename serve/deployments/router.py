"""What Ray Serve's router does here: it brings each call to the replica it names, and tells which ones Serve gives up.

Requests take the channel, to the replica that the gateway's pool has chosen (`serve/gateway/routing.py`, with load
reports a tenth of a second old). What comes this way is a gateway's attendance at a replica (`serve/channel.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ChosenReplicaRouter(RequestRouter):
    """Ranks the replica named by the call's `replica_id` first.

    When it is gone any other will do: it refuses the call at once with `ReplicaLost`, instead of letting it wait here
    for a replica that will not come back.
    """

    on_retired: ClassVar[Callable[[frozenset[str]], object] | None] = None
    """Called from Serve's thread with the ids of replicas that Serve has taken out of service: to stop them once they
    have no work, or because they are unhealthy. Of the class, because Serve makes its routers itself."""

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        before = _ids(list(self.curr_replicas.values()))
        super().update_replicas(list(replicas))
        retired = before - _ids(replicas)
        if retired and ChosenReplicaRouter.on_retired is not None:
            ChosenReplicaRouter.on_retired(retired)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.kwargs.get("replica_id") if pending_request is not None else None
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        return [chosen or candidate_replicas]


def _ids(replicas: Sequence[RunningReplica]) -> frozenset[str]:
    return frozenset(replica.replica_id.unique_id for replica in replicas)
