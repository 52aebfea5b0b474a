"""A process's connection to the hub (`hub.py`): it registers, follows which replicas there are, and pushes what it has
counted."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable

from serve import wire
from serve.connection import Connection, connect
from serve.errors import Unavailable
from serve.recorder import Recorder
from serve.wire import ReplicaEntry

log = logging.getLogger(__name__)

PURPOSE = "hub"
TO_HUB: frozenset[type[wire.Frame]] = frozenset({wire.Join, wire.Push, wire.Register, wire.Follow, wire.Scrape})
TO_CLIENT: frozenset[type[wire.Frame]] = frozenset({wire.Entries, wire.Change, wire.Exposition})

PUSH_PERIOD_S = 1.0
CONNECT_S = 15.0
"""How long the first connection to the hub is tried."""
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
"""Pauses between attempts to reach the hub."""
SETTLE_S = 3.0
"""After a reconnection, how long a list of replicas is held back: a hub that was restarted knows nobody at first."""
SCRAPE_S = 5.0

Address = str | Callable[[], Awaitable[str]]
"""Where the hub listens, or a function that finds it out (on Ray it moves when it is restarted)."""


class HubClient:
    """A process's connection to the hub; it is made again whenever it ends. Made by `connect`."""

    def __init__(
        self,
        address: Address,
        secret: bytes,
        process: str,
        recorder: Recorder | None,
    ):
        self._address = address
        self._secret = secret
        self._process = process
        self._recorder = recorder
        self._incarnation = secrets.token_hex(8)
        self._connection: Connection | None = None
        self._connected = asyncio.Event()
        self._failure = ""
        self._entry: ReplicaEntry | None = None
        self._entries: dict[str, ReplicaEntry] | None = None
        """By id, as far as they were told."""
        self._registered = asyncio.Event()
        self._watchers: list[Callable[[list[ReplicaEntry]], None]] = []
        self._settling: asyncio.TimerHandle | None = None
        self._scrapes: dict[int, asyncio.Future[str]] = {}
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def connect(
        cls,
        address: Address,
        *,
        secret: bytes,
        process: str,
        recorder: Recorder | None = None,
        timeout_s: float = CONNECT_S,
    ) -> HubClient:
        """Join the hub as `process`, whose `recorder` is pushed from now on.

        Raises Unavailable when the hub cannot be reached at first, for `timeout_s`; later it is tried for ever.
        """
        if isinstance(address, str):
            wire.Address.parse(address)
        client = cls(address, secret, process, recorder)
        client._tasks = [asyncio.create_task(client._stay_connected()), asyncio.create_task(client._push_regularly())]
        try:
            await asyncio.wait_for(client._connected.wait(), timeout_s)
        except BaseException as error:
            await client.aclose()
            if isinstance(error, TimeoutError):
                raise Unavailable(f"the hub cannot be reached: {client._failure}") from None
            raise
        return client

    async def register(self, entry: ReplicaEntry) -> None:
        """Be listed as a replica from now on; returns when the hub lists it."""
        self._entry = entry
        self._registered.clear()
        if self._connection is not None:
            self._connection.send(wire.Register(entry))
        await self._registered.wait()

    def watch(self, callback: Callable[[list[ReplicaEntry]], None]) -> None:
        """Call `callback` with the list of replicas, now if it is known and at every change."""
        self._watchers.append(callback)
        if self._entries is not None:
            callback(_by_id(self._entries))
        elif len(self._watchers) == 1 and self._connection is not None:
            self._connection.send(wire.Follow())

    async def render(self) -> str:
        """The exposition text of all processes, this one up to now. Raises Unavailable."""
        connection, number = self._connection, next(self._numbers)
        if connection is None:
            raise Unavailable(f"the metrics hub cannot be reached: {self._failure}")
        self._push()
        self._scrapes[number] = asyncio.get_running_loop().create_future()
        connection.send(wire.Scrape(number))
        try:
            return await asyncio.wait_for(self._scrapes[number], SCRAPE_S)
        except TimeoutError:
            raise Unavailable(f"the metrics hub did not answer within {SCRAPE_S:g} s") from None
        finally:
            del self._scrapes[number]

    async def aclose(self) -> None:
        """Push once more and leave."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if (connection := self._connection) is not None:
            self._push()
            connection.close()
            await connection.wait_closed()

    # -- the peer of the connection --------------------------------------------------------------------------------

    def received(self, frame: wire.Frame) -> None:
        if isinstance(frame, wire.Entries):
            self._entries = {entry.replica_id: entry for entry in frame.entries}
            self._notify()
        elif isinstance(frame, wire.Change):
            if self._entry in frame.came:
                self._registered.set()
            if self._entries is not None:
                self._entries |= {entry.replica_id: entry for entry in frame.came}
                for replica_id in frame.gone:
                    self._entries.pop(replica_id, None)
                self._notify()
        elif isinstance(frame, wire.Exposition):
            scrape = self._scrapes.get(frame.number)
            if scrape is not None and not scrape.done():
                scrape.set_result(frame.text)

    def gather(self) -> Iterable[bytes]:
        return ()

    def writable(self) -> None:
        """Snapshots are bounded and replace each other: nothing waits for room."""

    def lost(self, reason: str) -> None:
        self._connection, self._failure = None, reason
        for scrape in self._scrapes.values():
            if not scrape.done():
                scrape.set_exception(Unavailable(f"the metrics hub was lost: {reason}"))

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                address = self._address if isinstance(self._address, str) else await self._address()
                connection = await connect(address, secret=self._secret, purpose=PURPOSE, accepts=TO_CLIENT)
            except Exception as error:  # the function that finds the address may fail in any way
                self._failure = str(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)
                continue
            pause = FIRST_PAUSE_S
            self._arrive(connection)
            await connection.wait_closed()
            log.warning("hub lost process=%s reason=%r", self._process, self._failure)

    def _arrive(self, connection: Connection) -> None:
        connection.attach(self)
        connection.send(wire.Join(self._process, self._incarnation))
        if self._entry is not None:
            connection.send(wire.Register(self._entry))
        if self._watchers:
            connection.send(wire.Follow())
        if self._connected.is_set():
            if self._settling is not None:
                self._settling.cancel()
            self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self._settle)
        self._connection = connection
        self._connected.set()
        self._push()

    def _settle(self) -> None:
        self._settling = None
        self._notify()

    def _notify(self) -> None:
        if self._settling is None:
            for callback in self._watchers:
                callback(_by_id(self._entries or {}))

    async def _push_regularly(self) -> None:
        while True:
            await asyncio.sleep(PUSH_PERIOD_S)
            self._push()

    def _push(self) -> None:
        if self._connection is not None and self._recorder is not None:
            self._connection.send(wire.Push(self._recorder.snapshot()))


def _by_id(entries: dict[str, ReplicaEntry]) -> list[ReplicaEntry]:
    return [entries[replica_id] for replica_id in sorted(entries)]
