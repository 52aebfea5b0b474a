"""The hub as a deployment: one replica that keeps the registry and the metrics of the application."""

from __future__ import annotations

import asyncio
import logging

from ray import serve as ray_serve

from serve.deployments.node import listening_address
from serve.hub import Hub
from serve.logs import configure_logging

log = logging.getLogger(__name__)

WATCH_PERIOD_S = 1.0
_LEAVING = {"STOPPING", "STOPPED"}


class HubDeployment:
    """Owns a `Hub` on a TCP port of its node. When it is restarted its address changes: clients ask for it again."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, secret: bytes, host: str | None, ports: str | None, elastic: dict[str, str]
    ) -> None:
        """`elastic`: the model of each deployment that Serve scales."""
        configure_logging()
        self._hub = Hub(secret)
        self._address = await self._hub.start(listening_address(host, ports))
        self._watching = asyncio.create_task(self._watch(elastic)) if elastic else None

    async def address(self) -> str:
        return self._address

    async def _watch(self, elastic: dict[str, str]) -> None:
        """Count what Serve has asked for: its policies run in its controller, which pushes no metrics here."""
        application = ray_serve.get_replica_context().app_name
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                status = await asyncio.to_thread(ray_serve.status)
                deployments = status.applications[application].deployments
            except Exception as error:  # the controller is restarted by Ray
                log.warning("serve does not tell its status error=%r", error)
                continue
            for name, model in elastic.items():
                states = deployments[name].replica_states if name in deployments else {}
                self._hub.want(model, sum(number for state, number in states.items() if state not in _LEAVING))
