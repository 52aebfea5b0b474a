"""The gateway as a Ray Serve actor that owns its HTTP socket.

Serve's own HTTP proxy carries nothing here but health: per-item streaming through object references costs several
times what the channel does, and the proxy accepts headers without limit.
"""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from serve.channel import Carrier
from serve.errors import ReplicaLost, TandemError
from serve.gateway.gateway import Gateway
from serve.hub import ReplicaEntry
from serve.logs import configure_logging
from serve.options import GatewayOptions
from serve.request import ModelCard, Request


class GatewayDeployment:
    """One gateway process. `models` maps the name of each model to the handle of its deployment."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, options: GatewayOptions, secret: bytes, hub: DeploymentHandle, models: dict[str, DeploymentHandle]
    ) -> None:
        configure_logging()
        self._models = models
        self._gateway = Gateway(
            options,
            gateway_id=ray_serve.get_replica_context().replica_id.unique_id,
            secret=secret,
            hub_address=hub.address.remote,
            carrier_for=self._carrier_for,
        )
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

    def _carrier_for(self, entry: ReplicaEntry) -> Carrier | None:
        """How a request reaches that replica: by a handle call that stays open until the request has ended."""
        handle = self._models.get(entry.model)
        if handle is None:
            return None

        async def carry(gateway_id: str, stream_id: int, request: Request) -> None:
            try:
                await handle.generate.remote(gateway_id, stream_id, request, replica_id=entry.replica_id)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, TandemError) else error from None
            except RayActorError:
                raise ReplicaLost(f"replica {entry.replica_id!r} ended; send the request again") from None

        return carry
