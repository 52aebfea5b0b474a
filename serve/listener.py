"""A listening socket whose connections have proved that they know the secret. Unix sockets are this user's alone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Callable

from serve.connection import Connection
from serve.wire import Address, Frame

MAX_STRANGERS = 64
"""Connections that have not proved themselves yet; further ones are cut off at once."""


class Listener:
    """A listening socket that hands over proven connections."""

    def __init__(
        self, secret: bytes, purpose: str, *, accepts: frozenset[type[Frame]], on_ready: Callable[[Connection], None]
    ):
        self._secret = secret
        self._purpose = purpose
        self._accepts = accepts
        self._on_ready = on_ready
        self._server: asyncio.Server | None = None
        self._path = ""
        self._connections: set[Connection] = set()

    async def start(self, address: str) -> str:
        """Listen; the actual address: port 0 becomes a free one, FIRST-LAST the first free one of these. Raises
        ValueError and OSError."""
        if ports := re.fullmatch(r"(tcp:.+:)(\d+)-(\d+)", address):
            return await self._start_in(ports[1], range(int(ports[2]), int(ports[3]) + 1))
        where = Address.parse(address)
        loop = asyncio.get_running_loop()
        if where.path:
            self._server = await loop.create_unix_server(self._accept, sock=_unix_socket(where.path))
            self._path = where.path
            return address
        if where.host in ("0.0.0.0", "::"):
            raise ValueError(f"address is {address!r}; name one address of this machine, not all of them")
        self._server = await loop.create_server(self._accept, where.host, where.port)
        return str(Address(host=where.host, port=self._server.sockets[0].getsockname()[1]))

    async def _start_in(self, prefix: str, ports: range) -> str:
        for port in ports:
            try:
                return await self.start(f"{prefix}{port}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, f"every port from {ports[0]} to {ports[-1]} is in use; give channel_ports more")

    async def aclose(self) -> None:
        """Stop listening and end every connection, sending what is due."""
        if self._server is not None:
            self._server.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._path = ""
        for connection in list(self._connections):
            connection.close()
        await asyncio.gather(*(connection.wait_closed() for connection in list(self._connections)))

    def _accept(self) -> Connection:
        return Connection(
            self._secret, self._purpose, accepts=self._accepts, on_stranger=self._may_stay, on_ready=self._on_ready
        )

    def _may_stay(self, stranger: Connection) -> bool:
        self._connections.add(stranger)
        stranger.closed.add_done_callback(lambda _: self._connections.discard(stranger))
        return sum(not connection.is_authenticated for connection in self._connections) <= MAX_STRANGERS


def _unix_socket(path: str) -> socket.socket:
    """A bound socket that only this user may open (0600 from its first moment on Linux)."""
    if len(path.encode()) > 107:
        raise ValueError(f"address is {path!r}; a unix socket's path has at most 107 bytes")
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _is_alive(path):
            os.unlink(path)  # left behind by a process that was killed
    listener = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        os.chmod(path, 0o600)
    except OSError:
        listener.close()
        raise
    return listener


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
