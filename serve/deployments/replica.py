"""A model's replica as a Ray Serve actor: `serve/replica.py` with Ray's view of its requests.

Ray carries each request and its end, the channel carries the steps: `generate` returns when the request's stream has
ended, so that Serve's accounting of ongoing requests, its draining and its cancellation mean what they say.
"""

from __future__ import annotations

import math
from functools import partial

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.deployments.node import node_address, num_nodes
from serve.deployments.ranks import RayLauncher
from serve.errors import ReplicaLost
from serve.logs import configure_logging
from serve.options import ModelOptions
from serve.replica import Replica, build, end_process
from serve.request import ModelCard, Request


class ReplicaDeployment:
    """One replica of one model. Its actor is healthy while its engine is; a dead engine ends the process."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, options: ModelOptions, secret: bytes, hub: DeploymentHandle, host: str | None, num_replicas: int
    ) -> None:
        """`num_replicas`: of all models of the application, spread over the cluster's nodes."""
        configure_logging()
        launcher = RayLauncher(options) if options.num_ranks > 1 else None

        def end(status: int) -> None:
            if launcher is not None:
                launcher.kill()
            end_process(status)

        self._id = ray_serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(
            options,
            replica_id=self._id,
            secret=secret,
            hub_address=hub.address.remote,
            address=f"tcp:{host or node_address()}:0",
            build=partial(build, num_replicas_here=math.ceil(num_replicas / num_nodes()), launcher=launcher),
            exit=end,
        )
        await self._replica.start()

    async def generate(self, gateway_id: str, stream_id: int, request: Request, *, replica_id: str) -> None:
        """Run `request` as stream `stream_id` of that gateway's connection; return when the stream has ended.

        Raises ReplicaLost when Ray brought the request to another replica than the one whose channel waits for it.
        """
        if replica_id != self._id:
            raise ReplicaLost(f"replica {replica_id!r} is gone; send the request again")
        await self._replica.server.run(gateway_id, stream_id, request)

    async def card(self) -> ModelCard:
        return self._replica.card

    async def check_health(self) -> None:
        await self._replica.check_health()
