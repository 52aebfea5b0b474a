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
from serve.deployments.router import ChosenReplicaRouter
from serve.gateway.gateway import Gateway
from serve.gateway.hold import Sleeper
from serve.hub import ReplicaEntry
from serve.logs import configure_logging
from serve.options import GatewayOptions
from serve.request import ModelCard


class GatewayDeployment:
    """One gateway process. `models` maps the name of each model to the handle of its deployment."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        options: GatewayOptions,
        secret: bytes,
        hub: DeploymentHandle,
        models: dict[str, DeploymentHandle],
        sleepers: tuple[Sleeper, ...],
    ) -> None:
        configure_logging()
        self._models = models
        self._gateway = Gateway(
            options,
            gateway_id=ray_serve.get_replica_context().replica_id.unique_id,
            secret=secret,
            hub_address=hub.address.remote,
            attend_for=self._attend_for,
            sleepers=sleepers,
            wake=self._wake,
        )
        loop = asyncio.get_running_loop()
        ChosenReplicaRouter.on_retired = lambda ids: loop.call_soon_threadsafe(self._gateway.retire, ids)
        self._url = await self._gateway.start()

    async def url(self) -> str:
        return self._url

    async def meet(self, models: list[str]) -> list[ModelCard]:
        """Wait until every one of `models` can be served from here; their cards."""
        await self._gateway.meet(models)
        return self._gateway.cards()

    async def drain(self, timeout_s: float) -> None:
        await self._gateway.drain(timeout_s)

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
            await handle.attend.remote(session_id, replica_id=entry.replica_id)

        return attend
