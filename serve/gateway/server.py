"""The gateway's own HTTP server: uvicorn's protocol on a socket of ours.

uvicorn's `Server` is not used: draining here means *keep answering*, with 503 for new work, until what runs has ended.
With several gateways on one machine they share the port (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from email.utils import formatdate

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from serve.errors import ConfigError, Draining
from serve.gateway.acceptor import Acceptor
from serve.gateway.drain import Drain
from serve.gateway.protocol import LimitedProtocol, Limits
from serve.options import GatewayOptions

LEAVING_S = 5.0
"""How long a connection may idle when the port is left to others: its next answer asks the client to connect anew."""
LAST_WORDS_S = 2.0
"""For error events to reach clients after a drain ran out."""


class GatewayServer:
    """One listening socket and its connections. Lives on one event loop."""

    def __init__(
        self,
        app: ASGIApp,
        options: GatewayOptions,
        drain: Drain | None = None,
        *,
        refused_connection: Callable[[], None] = lambda: None,
        shares_port: bool | None = None,
    ) -> None:
        """`shares_port`: others may listen there too (SO_REUSEPORT). None: when there are several gateways."""
        self._options = options
        self._shares_port = options.num_gateways > 1 if shares_port is None else shares_port
        self._drain = drain or Drain()
        self._state = ServerState()
        self._limits = Limits(options, refused_connection)
        self._config = Config(
            app,
            interface="asgi3",
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]  # seconds, whole or not
        )
        self._config.load()
        self._acceptor: Acceptor | None = None
        self._clock: asyncio.Task[None] | None = None

    async def start(self) -> tuple[str, int]:
        """Listen; the actual address. Raises ConfigError when it cannot be bound."""
        try:
            listener = self._bind()
            self._acceptor = Acceptor(listener, self._protocol)
        except (OSError, OverflowError) as error:
            raise ConfigError(_why(error, self._options)) from None
        self._clock = asyncio.create_task(self._tell_time())
        host, port = listener.getsockname()[:2]
        return host, port

    @property
    def is_listening(self) -> bool:
        return self._acceptor is not None and self._acceptor.is_listening

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work and wait for what runs; after `timeout_s` end it with an error."""
        self._drain.begin()
        if not await self._drain.idle(timeout_s):
            await self._cut_short()

    async def hand_over(self, timeout_s: float) -> None:
        """Leave the port to others, who share it: finish what runs, and see that clients connect anew.

        What comes on connections that are open is still answered, so that nobody is refused between the two."""
        self._limits.is_leaving = True
        if self._acceptor is not None:
            self._acceptor.close()
            await self._acceptor.opened()
        for connection in list(self._state.connections):
            if isinstance(connection, LimitedProtocol):
                connection.leave(LEAVING_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s + min(LEAVING_S, timeout_s)):  # idle ones stay while others run
                while self._state.connections:
                    self._limits.gone.clear()
                    await self._limits.gone.wait()
        await self.drain(0.0)

    async def aclose(self) -> None:
        """Close the socket and every connection; what still runs ends with an error."""
        self._drain.begin()
        if self._clock is not None:
            self._clock.cancel()
        if self._acceptor is not None:
            self._acceptor.close()
        await self._cut_short()
        for connection in list(self._state.connections):
            connection.transport.close()
        for task in list(self._state.tasks):
            task.cancel()
        await asyncio.gather(*self._state.tasks, return_exceptions=True)

    async def _cut_short(self) -> None:
        self._drain.abort(Draining("the server shut down before the answer was complete; send the request again"))
        await self._drain.idle(LAST_WORDS_S)

    def _protocol(self) -> LimitedProtocol:
        return LimitedProtocol(self._config, self._state, self._limits)

    def _bind(self) -> socket.socket:
        family, kind, proto, _, address = socket.getaddrinfo(
            self._options.host, self._options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._shares_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener

    async def _tell_time(self) -> None:
        """The Date header, renewed once a second."""
        while True:
            self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(1.0)


def _why(error: OSError | OverflowError, options: GatewayOptions) -> str:
    where = f"{options.host}:{options.port}"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program; give another --port (0 takes a free one)"
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return f"{where} may not be bound by this user; give a --port above 1023"
    return f"{where} cannot be bound: {getattr(error, 'strerror', None) or error}; give another --host or --port"
