"""What the routes share: the collaborators of one gateway, and how a request for any kind of model is answered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from starlette.requests import Request

from serve.errors import InvalidRequest
from serve.gateway import context
from serve.gateway.context import RequestContext
from serve.gateway.drain import Drain
from serve.gateway.exchange import Exchange
from serve.gateway.pool import Pool
from serve.gateway.prepared import Ready
from serve.gateway.telemetry import Telemetry
from serve.options import GatewayOptions

TIMEOUT_HEADER = "x-request-timeout"
MAX_TIMEOUT_S = 86400
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,6})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks, and how long the request may take."""

    context: RequestContext
    timeout_s: float


class Endpoint(Protocol):
    """A route that generates."""

    @property
    def kind(self) -> str:
        """Of the models it takes."""
        ...

    async def prepare(self, body: Any, card: Any, caller: Caller) -> Ready:
        """A checked body as what is to be submitted. Raises InvalidRequest."""
        ...


@dataclass(frozen=True, slots=True)
class Service:
    """The collaborators."""

    pool: Pool
    options: GatewayOptions
    telemetry: Telemetry
    drain: Drain

    def generate(self, http: Request, body: Any, endpoint: Endpoint) -> Exchange:
        """The answer to a checked body. Raises InvalidRequest for a header that is wrong."""
        about = context.of(http.scope)
        self.telemetry.asked(about, body)
        caller = Caller(context=about, timeout_s=self._timeout_s(http, body))

        async def prepare() -> Ready:
            if not self.pool.models.knows(body.model):
                await self._wake(body.model, caller)
            card = self.pool.models.find(body.model, endpoint.kind)
            about.model = card.name
            prepared = await endpoint.prepare(body, card, caller)
            await self._wake(card.name, caller)
            return prepared

        return Exchange(
            prepare,
            is_stream=bool(body.stream),
            timeout_s=caller.timeout_s,
            context=about,
            drain=self.drain,
            heartbeat_s=self.options.heartbeat_s,
        )

    async def _wake(self, name: str | None, caller: Caller) -> None:
        """Wait for a replica of a model that sleeps; nothing for any other. Raises Unavailable."""
        sleeper = self.pool.hold.find(name)
        if sleeper is not None:
            await self.pool.hold.wait(
                sleeper.name,
                partial(self.pool.awaited, sleeper.name),
                caller.timeout_s,
                partial(self.pool.return_s, sleeper.name),
            )

    def _timeout_s(self, http: Request, body: Any) -> float:
        """The body's timeout, else the header's, at most the server's own."""
        limit = self.options.default_timeout_s
        header = ", ".join(http.headers.getlist(TIMEOUT_HEADER)) or None
        if header is not None and not (_SECONDS.fullmatch(header) and 0 < float(header) <= MAX_TIMEOUT_S):
            raise InvalidRequest(
                f"the header {TIMEOUT_HEADER} must be seconds in digits, above 0 and at most {MAX_TIMEOUT_S}",
                param=TIMEOUT_HEADER,
            )
        wanted = body.timeout or (limit if header is None else float(header))
        return min(wanted, limit)
