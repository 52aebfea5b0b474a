"""Whether the gateway takes new work, and what it has not finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.errors import TandemError

Abort = Callable[[TandemError], None]


class Drain:
    """One per gateway. Requests are counted while they run; those that can be cut short leave an `abort`."""

    def __init__(self) -> None:
        self.is_active = False
        self.num_in_flight = 0
        self._aborts: set[Abort] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """From now on readiness is false and new work is refused."""
        self.is_active = True

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False when `timeout_s` is over first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort(self, error: TandemError) -> None:
        """End what still runs with `error`."""
        for abort in list(self._aborts):
            abort(error)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around one request."""
        self.num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if self.num_in_flight == 0:
                self._idle.set()

    @contextmanager
    def abortable(self, abort: Abort) -> Iterator[None]:
        self._aborts.add(abort)
        try:
            yield
        finally:
            self._aborts.discard(abort)
