"""The gateway as a Ray Serve actor that owns its HTTP socket.

Serve's own HTTP proxy carries nothing here but health: per-item streaming through object references costs several
times what the channel does, and the proxy accepts headers without limit.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.channel import Attend
from serve.deployments.node import node_address, num_nodes
from serve.deployments.router import ChosenReplicaRouter
from serve.errors import ReplicaLost
from serve.gateway.gateway import Gateway
from serve.gateway.hold import Sleeper
from serve.logs import configure_logging
from serve.options import GatewayOptions
from serve.request import ModelCard
from serve.wire import ReplicaEntry

MEETING_S = 20.0
"""For replicas to be met before a gateway listens that may follow another: those that run register within seconds."""


class GatewayDeployment:
    """One gateway process. `models` maps the name of each model to the handle of its deployment."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        options: GatewayOptions,
        secret: bytes,
        hub: DeploymentHandle,
        models: dict[str, DeploymentHandle],
        sleepers: tuple[Sleeper, ...],
        shares_port: bool,
    ) -> None:
        """`shares_port`: an update may start this one before the one that it replaces has left the port."""
        configure_logging()
        self._drain_timeout_s = options.drain_timeout_s
        self._is_everywhere = options.host in ("0.0.0.0", "::")
        self._models = models
        self._gateway = Gateway(
            options,
            gateway_id=ray_serve.get_replica_context().replica_id.unique_id,
            secret=secret,
            hub_address=hub.address.remote,
            attend_for=self._attend_for,
            shares_port=shares_port or None,
            models=tuple(models),
            sleepers=sleepers,
            wake=self._wake,
        )
        loop = asyncio.get_running_loop()
        ChosenReplicaRouter.on_retired = lambda ids: loop.call_soon_threadsafe(self._gateway.retire, ids)
        awake = [name for name in models if name not in {sleeper.name for sleeper in sleepers}]
        self._url = await self._gateway.start(meet=awake, within_s=MEETING_S if shares_port else 0.0)

    async def url(self) -> str:
        """Where clients reach this one; with several nodes by its own's address, if it listens there."""
        if self._is_everywhere and num_nodes() > 1:
            return f"http://{node_address()}:{self._url.rpartition(':')[2]}"
        return self._url

    async def meet(self, models: list[str]) -> list[ModelCard]:
        """Wait until every one of `models` can be served from here; their cards."""
        await self._gateway.meet(models)
        return self._gateway.cards()

    async def drain(self, timeout_s: float) -> None:
        await self._gateway.drain(timeout_s)

    async def __del__(self) -> None:
        """Serve calls it before it kills this process. It has no calls open, so Serve knows of no client here."""
        await self._gateway.hand_over(self._drain_timeout_s)
        await self._gateway.aclose()

    async def check_health(self) -> None:
        self._gateway.check_health()

    async def __call__(self, request: Any) -> str:
        """What Serve's HTTP proxy gets, where one runs: enough for a health probe."""
        return "tandem: the API is at " + self._url

    async def _wake(self, model: str) -> None:
        """A call that Serve keeps until the model has a replica."""
        response = self._models[model].wake.remote()
        try:
            await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _attend_for(self, entry: ReplicaEntry) -> Attend | None:
        """A handle call that stays open at that replica as long as this gateway has streams there."""
        handle = self._models.get(entry.model)
        if handle is None:
            return None

        async def attend(session_id: str) -> None:
            if not await handle.attend.remote(session_id, replica_id=entry.replica_id):
                raise ReplicaLost(f"replica {entry.replica_id!r} is not in service")

        return attend
