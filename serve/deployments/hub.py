"""The hub as a deployment: one replica that keeps the registry and the metrics of the application."""

from __future__ import annotations

from serve.deployments.node import listening_address
from serve.hub import Hub
from serve.logs import configure_logging


class HubDeployment:
    """Owns a `Hub` on a TCP port of its node. When it is restarted its address changes: clients ask for it again."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, secret: bytes, host: str | None, ports: str | None
    ) -> None:
        configure_logging()
        self._hub = Hub(secret)
        self._address = await self._hub.start(listening_address(host, ports))

    async def address(self) -> str:
        return self._address
