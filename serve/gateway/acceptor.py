"""A listening socket that takes all connections that wait whenever its event loop looks.

asyncio's own server does so too; libuv takes one a turn of the loop (uvloop, which Ray's workers run). A turn of a busy
gateway is a step's events of all its streams, so clients of 128 streams waited 0.35 s for that (two cores, tiny model).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable

log = logging.getLogger(__name__)

BACKLOG = 2048
PAUSE_S = 1.0
"""After the process or the machine has run out of descriptors."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Lives on one event loop."""

    def __init__(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Takes over `listener`, which is bound. Raises OSError when it cannot listen."""
        self._listener = listener
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._watch()

    @property
    def is_listening(self) -> bool:
        return self._listener.fileno() >= 0

    def close(self) -> None:
        """Take those that wait, then stop listening. Any number of times."""
        if self.is_listening:
            self._take()
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    async def opened(self) -> None:
        """Return when all that were taken have their protocol."""
        await asyncio.gather(*self._opening)

    def _watch(self) -> None:
        if self.is_listening:
            self._loop.add_reader(self._listener.fileno(), self._take)

    def _take(self) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                log.error("connections not accepted reason=%r pause_s=%s", str(error), PAUSE_S)
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(PAUSE_S, self._watch)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone again
            await self._loop.connect_accepted_socket(self._protocol, connection)
