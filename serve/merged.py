"""Several event streams as one: the choices of a text request, the images of an image request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from serve.backend import EventStream
from serve.errors import TandemError
from serve.events import Event


def merge(streams: Sequence[EventStream]) -> EventStream:
    """One stream of them all; a single one as it is."""
    return streams[0] if len(streams) == 1 else Merged(streams)


class Merged:
    """An `EventStream`: each of several has a read pending; a read here takes all that are done.

    The first one has the first word: with it comes what is said once for all. If one fails, all end.
    """

    def __init__(self, streams: Sequence[EventStream]):
        self._streams = streams
        self._idle, self._held = list(streams[:1]), list(streams[1:])
        self._reads: dict[asyncio.Task[list[Event] | TandemError], EventStream] = {}

    def __aiter__(self) -> Merged:
        return self

    async def __anext__(self) -> list[Event]:
        events: list[Event] = []
        while not events:
            while self._idle:
                stream = self._idle.pop()
                self._reads[asyncio.ensure_future(_read(stream))] = stream
            if not self._reads:
                raise StopAsyncIteration
            await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
            for read in [read for read in self._reads if read.done()]:
                stream, result = self._reads.pop(read), read.result()
                if isinstance(result, TandemError):
                    await self.aclose()
                    raise result
                if result:
                    events += result
                    self._idle.append(stream)
            self._idle, self._held = self._idle + self._held, []
        return events

    async def aclose(self) -> None:
        for stream in self._streams:
            await stream.aclose()


async def _read(stream: EventStream) -> list[Event] | TandemError:
    """One read, with a stream's end as an empty list and its error as a value: nobody may be left to retrieve them."""
    try:
        return await anext(stream, [])
    except TandemError as error:
        return error
