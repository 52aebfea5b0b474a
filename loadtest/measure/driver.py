"""Sends a load and waits for its answers: open loop at times fixed before, or closed loop with so many at once.

One task a request; what a request needs is prepared before the clock starts. The last millisecond before a send is
spent yielding, not sleeping: timers of event loops are a millisecond coarse.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Any

from loadtest.measure.outcome import Outcome, Status
from loadtest.measure.watch import Watch
from loadtest.targets.target import Failed, Message, Target
from loadtest.traffic.ask import Ask, TextAsk
from loadtest.workload import CpuMeter

SPIN_S = 0.0012
RETRY_S = 0.2
"""A closed loop does not hammer a server that refuses connections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is sent in one run, and when."""

    asks: Iterator[Ask]
    offsets: Sequence[float] | None = None
    """Open loop: a request at each, in seconds from the start. None: closed loop."""
    num_requests: int | None = None
    """Closed loop: so many in all."""
    duration_s: float | None = None
    """Closed loop: no new ones after so long."""
    max_concurrency: int | None = None
    """Closed loop: so many at once. Open loop: those that are due wait for a place, which counts in their times."""
    probes: Iterator[Ask] = field(default_factory=lambda: iter(()))
    probe_rate: float = 0.0
    """Small requests a second beside the load, evenly spaced, until it has ended."""
    request_timeout_s: float = 600.0
    lost_after_s: float = 5.0
    """Nothing but failures for so long: the server is lost."""


class Ending(StrEnum):
    DONE = "done"
    LOST = "lost"
    """The server answered nothing more."""
    HOPELESS = "hopeless"
    """The caller saw enough."""
    INTERRUPTED = "interrupted"


@dataclass(slots=True)
class Run:
    """What came of a load. Times in outcomes are seconds since `origin` (perf_counter)."""

    origin: float
    began: float = field(default_factory=time.time)
    outcomes: list[Outcome] = field(default_factory=list)
    ending: Ending = Ending.DONE
    duration_s: float = 0.0
    num_planned: int | None = None
    last_error: str = ""
    client_cores: float = 0.0
    """Cores busy with this process, and with everything else on the machine."""
    other_cores: float = 0.0

    @property
    def num_in_flight(self) -> int:
        return sum(not outcome.end for outcome in self.outcomes)


Listener = Callable[[Outcome], None]


class Driver:
    """One run over one target."""

    def __init__(self, target: Target, load: Load, on_end: Listener = lambda outcome: None):
        """`on_end` is called with every request that has ended, in the event loop."""
        self._target = target
        self._load = load
        self._on_end = on_end
        self._numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._probes: set[asyncio.Task[None]] = set()
        """On the way. They do not hold the end up: there may always be one."""
        self._stop = asyncio.Event()
        self._watch = Watch(load.lost_after_s, time.perf_counter)
        self._places: AbstractAsyncContextManager[Any] = nullcontext()
        if load.offsets is not None and load.max_concurrency:
            self._places = asyncio.Semaphore(load.max_concurrency)
        self.run = Run(time.perf_counter())

    async def __call__(self) -> Run:
        """Until every request has ended, the server is lost, or somebody called `stop`."""
        load = self._load
        prepared = []
        if load.offsets is not None:
            prepared = [(ask, self._target.prepare(ask)) for ask, _ in zip(load.asks, load.offsets)]
            self.run.num_planned = len(prepared)
        else:
            self.run.num_planned = load.num_requests
        meter = CpuMeter()
        self.run.origin, self.run.began = time.perf_counter(), time.time()
        main = asyncio.create_task(self._open(prepared) if load.offsets is not None else self._closed())
        probing = asyncio.create_task(self._probe()) if load.probe_rate else None
        stopping = asyncio.create_task(self._stop.wait())
        watching = asyncio.create_task(self._watching())
        try:
            await asyncio.wait({main, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if main.done():
                main.result()
        except asyncio.CancelledError:
            self.run.ending = Ending.INTERRUPTED
        finally:
            every = (main, probing, stopping, watching, *self._tasks, *self._probes)
            rest = [task for task in every if task is not None]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        self.run.duration_s = max(
            (outcome.end for outcome in self.run.outcomes if outcome.group != "probe"), default=self._now()
        )
        self.run.client_cores, self.run.other_cores = meter.cores()
        self.run.last_error = self._watch.last_error
        return self.run

    def stop(self, ending: Ending) -> None:
        """End now: requests on the way are left."""
        if not self._stop.is_set():
            self.run.ending = ending
            self._stop.set()

    def _now(self) -> float:
        return time.perf_counter() - self.run.origin

    async def _open(self, prepared: list[tuple[Ask, Any]]) -> None:
        assert self._load.offsets is not None
        for offset, (ask, ready) in zip(self._load.offsets, prepared):
            await self._until(offset)
            self._begin(self._converse(ask, ready, offset), self._tasks)
        await self._all()

    async def _closed(self) -> None:
        load, numbers = self._load, count()

        async def client() -> None:
            for ask in load.asks:
                if load.num_requests is not None and next(numbers) >= load.num_requests:
                    return
                if load.duration_s is not None and self._now() >= load.duration_s:
                    return
                await self._converse(ask, self._target.prepare(ask), None)

        for _ in range(load.max_concurrency or 1):
            self._begin(client(), self._tasks)
        await self._all()

    async def _probe(self) -> None:
        for number, ask in enumerate(self._load.probes):
            offset = (number + 0.5) / self._load.probe_rate
            await self._until(offset)
            self._begin(self._one(ask, self._target.prepare(ask), offset), self._probes)

    async def _watching(self) -> None:
        while not self._watch.is_lost:
            await asyncio.sleep(RETRY_S)
        self.stop(Ending.LOST)

    async def _until(self, offset: float) -> None:
        if (wait := offset - self._now() - SPIN_S) > 0:
            await asyncio.sleep(wait)
        while self._now() < offset:
            await asyncio.sleep(0)

    def _begin(self, coroutine: Any, tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _all(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _converse(self, ask: Ask, ready: Any, scheduled: float | None) -> None:
        """A request and the turns that follow it."""
        history: list[Message] = []
        while True:
            outcome = await self._one(ask, ready, scheduled)
            if not isinstance(ask, TextAsk) or ask.follow_up is None or not outcome.is_ok:
                return
            answer = {"role": "assistant", "content": "".join(outcome.text)}
            history += [{"role": "user", "content": ask.prompt}, answer]
            scheduled = outcome.end + ask.think_s
            ask = ask.follow_up
            ready = self._target.prepare(ask, history)
            await self._until(scheduled)

    async def _one(self, ask: Ask, ready: Any, scheduled: float | None) -> Outcome:
        """Send one request. A failure is an outcome too."""
        outcome = Outcome(next(self._numbers), ask, self._now() if scheduled is None else scheduled)
        self.run.outcomes.append(outcome)
        places = self._places if ask.group != "probe" else nullcontext()
        async with places:
            outcome.sent = self._now() if scheduled is not None else outcome.scheduled
            await self._sent(outcome, ready)
        if not outcome.end:
            outcome.end = self._now()
        self._watch.note(outcome)
        self._on_end(outcome)
        if outcome.status is Status.ERROR and self._load.offsets is None:
            await asyncio.sleep(RETRY_S)
        return outcome

    async def _sent(self, outcome: Outcome, ready: Any) -> None:
        cancel_s, limit_s = outcome.ask.cancel_after_s, self._load.request_timeout_s
        try:
            async with asyncio.timeout(limit_s if cancel_s is None else min(cancel_s, limit_s)):
                await self._target.send(ready, outcome, self.run.origin)
            outcome.status = Status.OK
        except TimeoutError:
            is_ours = cancel_s is not None and cancel_s < limit_s
            outcome.status = Status.CANCELLED if is_ours else Status.TIMEOUT
            outcome.error = "" if is_ours else f"no end within {limit_s:g} s"
        except Failed as error:
            outcome.status = Status.REJECTED if error.is_rejected else Status.ERROR
            outcome.error = str(error)
        except asyncio.CancelledError:
            outcome.end = self._now()
            raise


async def warm_up(target: Target, asks: Iterator[Ask], number: int, timeout_s: float) -> None:
    """So many requests, all at once, that nobody measures. Raises Failed when none is answered."""
    driver = Driver(target, Load(asks=asks, num_requests=number, max_concurrency=number, request_timeout_s=timeout_s))
    run = await driver()
    if not any(outcome.is_ok for outcome in run.outcomes):
        raise Failed(next((outcome.error for outcome in run.outcomes if outcome.error), "no answer"))
