"""What a running system notices of itself, and when: it follows the hub and has a connection to every replica.

It lives on an event loop in a thread of its own. Times are the monotonic clock's, which one machine's processes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable

from serve.channel import ChannelClient
from serve.errors import TandemError
from serve.hub_client import HubClient
from serve.wire import ReplicaEntry

LOOK_PERIOD_S = 0.02
"""Between two looks at the replicas' load, which they report ten times a second."""


class Observer:
    """Close it. What it has noticed grows."""

    def __init__(self, hub_address: Callable[[], Awaitable[str]], secret: bytes) -> None:
        self.lost: list[tuple[float, str]] = []
        """When a connection to a replica ended, whoever ended it, and which."""
        self.busy: list[tuple[float, int]] = []
        """When the number of jobs that all replicas report has changed, and to what."""
        self._hub_address = hub_address
        self._secret = secret
        self._clients: dict[str, ChannelClient] = {}
        self._named: dict[str, ReplicaEntry] = {}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    @property
    def num_connected(self) -> int:
        return len(self._clients)

    def lost_s(self, moment: float) -> float | None:
        """From that moment until the connection to a replica ended, to the last one of several; None without any."""
        return max([when - moment for when, _ in self.lost if when > moment], default=None)

    def freed_s(self, moment: float) -> float | None:
        """From that moment until replicas reported no job for the first time; None when they did not."""
        return next((when - moment for when, num_jobs in self.busy if when > moment and not num_jobs), None)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        self._hub = await HubClient.connect(self._hub_address, secret=self._secret, process="observer")
        self._hub.watch(self._update)
        self._looking = asyncio.create_task(self._look())

    async def _stop(self) -> None:
        self._looking.cancel()
        for task in self._connecting.values():
            task.cancel()
        await self._hub.aclose()
        for client in list(self._clients.values()):
            await client.aclose()

    def _update(self, entries: list[ReplicaEntry]) -> None:
        named = {entry.replica_id: entry for entry in entries if entry.address}
        self._named = named
        for name in named:
            if name not in self._clients and name not in self._connecting:
                self._connecting[name] = asyncio.create_task(self._connect(name))

    async def _connect(self, name: str) -> None:
        """Until it is connected or the hub no longer names the replica."""

        def on_lost() -> None:
            self.lost.append((time.monotonic(), name))
            self._clients.pop(name, None)

        try:
            while (entry := self._named.get(name)) is not None:
                with contextlib.suppress(TandemError, OSError):
                    client = await ChannelClient.connect(
                        entry.address, secret=self._secret, gateway_id="observer", on_lost=on_lost
                    )
                    if client.is_alive:
                        self._clients[name] = client
                        return
                await asyncio.sleep(LOOK_PERIOD_S)
        finally:
            del self._connecting[name]

    async def _look(self) -> None:
        while True:
            loads = [client.load() for client in self._clients.values()]
            num_jobs = sum(load.running + load.waiting for load in loads)
            if not self.busy or self.busy[-1][1] != num_jobs:
                self.busy.append((time.monotonic(), num_jobs))
            await asyncio.sleep(LOOK_PERIOD_S)
