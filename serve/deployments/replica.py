"""A model's replica as a Ray Serve actor: `serve/replica.py` with Ray's view of its requests.

Requests and their tokens take the channel. Serve knows of them by `attend`: each gateway with streams here has one call
open, so that Serve does not end a replica that has work. To Serve a replica's ongoing requests are its busy gateways.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.deployments.node import listening_address, num_nodes
from serve.deployments.ranks import RayLauncher
from serve.deployments.stopping import told_to_stop
from serve.logs import configure_logging
from serve.options import ModelOptions
from serve.replica import Replica, Served, build, end_process
from serve.request import ModelCard


class ReplicaDeployment:
    """One replica of one model. Its actor is healthy while its engine is; a dead engine ends the process."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        options: ModelOptions,
        secret: bytes,
        hub: DeploymentHandle,
        host: str | None,
        ports: str | None,
        num_replicas: int,
        drain_timeout_s: float,
        build: Callable[..., Served] = build,
    ) -> None:
        """`host`, `ports`: where it listens for gateways, as `listening_address` takes them. `num_replicas`: of all
        models of the application at most, spread over the cluster's nodes. `build`: loads the model."""
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
            address=listening_address(host, ports),
            build=partial(build, num_replicas_here=math.ceil(num_replicas / num_nodes()), launcher=launcher),
            exit=end,
        )
        await self._replica.start()
        self._leaving = asyncio.create_task(self._leave(drain_timeout_s))

    async def attend(self, session_id: str, *, replica_id: str) -> bool:
        """Return soon after the last stream of that connection.

        False at once when Serve brought the call here because it no longer, or not yet, has the replica it names. (Not
        an exception: Serve writes each into its log as a failed request.)
        """
        if replica_id != self._id:
            return False
        await self._replica.server.attend(session_id)
        return True

    async def wake(self) -> None:
        """There is a replica: this one. While there is none, Serve keeps the call and starts one because of it."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve for `LoadPolicy`, where the model scales."""
        return asdict(self._replica.signals())

    async def card(self) -> ModelCard:
        return self._replica.card

    async def check_health(self) -> None:
        await self._replica.check_health()

    async def _leave(self, drain_timeout_s: float) -> None:
        """Once Serve wants it: gateways send nothing more, what runs may end, and what does not in time goes on at
        other replicas."""
        await told_to_stop()
        await self._replica.drain(drain_timeout_s)
        await self._replica.aclose()
