"""Clients that read streams of a server while something is done to it, and what each of them saw.

All of them live on one event loop in a thread of its own, so that whoever does something may block.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

TIMEOUT_S = 240.0
"""Of one answer: a client of a drill waits longer than anything may take."""
TICK_S = 0.05


@dataclass(slots=True)
class Seen:
    """What a client saw of its answer."""

    asked: float = 0.0
    """When, and below, when its pieces came; of the monotonic clock."""
    text: str = ""
    times: list[float] = field(default_factory=list)
    is_complete: bool = False
    error: str = ""

    @property
    def took_s(self) -> float:
        """From asking to the last piece."""
        return self.times[-1] - self.asked if self.times else 0.0

    def pause_after(self, moment: float) -> float:
        """The longest time between two pieces of which the second came after that moment."""
        return max((b - a for a, b in pairwise(self.times) if b > moment), default=0.0)


class Crowd:
    """`bodies` are asked for at once, as completions. `probe`, if given, again and again, one at a time, for new
    requests have to be answered as well."""

    def __init__(self, url: str, bodies: list[dict[str, Any]], probe: dict[str, Any] | None = None) -> None:
        self._url = f"{url}/v1/completions"
        self._bodies = bodies
        self._probe = probe
        self.seen = [Seen() for _ in bodies]
        self.probes: list[Seen] = []
        self.lag_s = 0.0
        """The longest that the clients themselves were held up: a busy machine's pauses are not the server's."""
        self._is_over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def wait_until_read(self, num_pieces: int) -> None:
        """Until every client has read so many pieces, or its end."""
        until = time.monotonic() + TIMEOUT_S
        while not all(len(seen.times) >= num_pieces or seen.is_complete or seen.error for seen in self.seen):
            if time.monotonic() > until:
                raise TimeoutError(f"the clients did not read {num_pieces} pieces within {TIMEOUT_S:g} s")
            time.sleep(0.01)

    def finish(self) -> list[Seen]:
        """What all saw, at the end."""
        self._is_over = True
        self._thread.join(2 * TIMEOUT_S)
        return self.seen

    @property
    def num_running(self) -> int:
        return sum(not seen.is_complete and not seen.error for seen in self.seen)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
            probing = asyncio.create_task(self._keep_probing(client, self._probe)) if self._probe is not None else None
            lagging = asyncio.create_task(self._watch_lag())
            await asyncio.gather(*(self._read(client, body, seen) for body, seen in zip(self._bodies, self.seen)))
            if probing is not None:
                await probing
            lagging.cancel()

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.lag_s = max(self.lag_s, time.monotonic() - due)

    async def _keep_probing(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        while not self._is_over:
            self.probes.append(seen := Seen())
            await self._read(client, body, seen)

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any], seen: Seen) -> None:
        seen.asked = time.monotonic()
        try:
            async with client.stream("POST", self._url, json=body | {"stream": True}) as response:
                if response.status_code != 200:
                    seen.error = f"{response.status_code}: {(await response.aread()).decode()}"
                    return
                async for line in response.aiter_lines():
                    self._take(line, seen)
        except httpx.HTTPError as error:
            seen.error = repr(error)
        if not seen.is_complete and not seen.error:
            seen.error = "the stream ended without its end"

    def _take(self, line: str, seen: Seen) -> None:
        if line == "data: [DONE]":
            seen.is_complete = not seen.error
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            if "error" in event:
                seen.error = f"{event['error']['code']}: {event['error']['message']}"
                return
            seen.times.append(time.monotonic())
            seen.text += "".join(choice["text"] for choice in event["choices"])
