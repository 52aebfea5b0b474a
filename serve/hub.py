"""The hub: which replicas there are, and what every process has counted. Everybody keeps one connection to it.

    replica ── Register, Push ──▶        ──▶ Entries ── gateway      a change reaches every gateway at once
    gateway ── Push, Scrape   ──▶  Hub   ──▶ Exposition ── gateway   any gateway's /metrics is the hub's

A registration lasts as long as its connection. Snapshots are cumulative and replace each other; a process that stops
pushing is shown for `expiry_s` more. When a process comes back under its name before that, its counters go on from
where its last life ended, so that none ever falls. The hub keeps nothing on disk: after a restart clients reconnect,
register and push again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable

from serve import wire
from serve.connection import Connection, connect
from serve.errors import Unavailable
from serve.exposition import render
from serve.listener import Listener
from serve.metrics import METRICS, UNKNOWN_MODEL, Series, Snapshot
from serve.recorder import Recorder
from serve.wire import ReplicaEntry

log = logging.getLogger(__name__)

EXPIRY_S = 15.0
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

_PURPOSE = "hub"
_TO_HUB: frozenset[type[wire.Frame]] = frozenset({wire.Join, wire.Push, wire.Register, wire.Scrape})
_TO_CLIENT: frozenset[type[wire.Frame]] = frozenset({wire.Entries, wire.Exposition})


class _Life:
    """What a process has counted, in this life and, under `before`, in those that ended."""

    def __init__(self, incarnation: str, before: dict[tuple[str, tuple[str, ...]], Series], now: float):
        self.incarnation = incarnation
        self.before = before
        self.snapshot = Snapshot("", ())
        self.has_registered = False
        """As a replica, in this life."""
        self.seen = now

    def totals(self) -> dict[tuple[str, tuple[str, ...]], Series]:
        """Everything counted so far. Gauges are this life's alone."""
        totals = dict(self.before)
        for series in self.snapshot.series:
            key = series.name, series.labels
            earlier = self.before.get(key)
            if earlier is not None and len(earlier.values) == len(series.values):
                series = Series(series.name, series.labels, tuple(map(sum, zip(earlier.values, series.values))))
            totals[key] = series
        return totals


class Hub:
    """The registry and the metrics of one application. Lives on one event loop."""

    def __init__(self, secret: bytes, *, expiry_s: float = EXPIRY_S, clock: Callable[[], float] = time.monotonic):
        self._expiry_s = expiry_s
        self._clock = clock
        self._recorder = Recorder("hub", "hub")
        self._listener = Listener(secret, _PURPOSE, accepts=_TO_HUB, on_ready=self._meet)
        self._members: set[_Member] = set()
        self._lives: dict[str, _Life] = {}
        self._wanted: dict[str, int] = {}

    async def start(self, address: str) -> str:
        """Listen and return the actual address. Raises ValueError and OSError."""
        return await self._listener.start(address)

    async def aclose(self) -> None:
        await self._listener.aclose()

    def entries(self) -> list[ReplicaEntry]:
        """The registered replicas, by id."""
        entries = [member.entry for member in self._members if member.entry is not None]
        return sorted(entries, key=lambda entry: entry.replica_id)

    def want(self, model: str, num_replicas: int) -> None:
        """So many replicas of `model` are asked for, by whoever scales it."""
        before = self._wanted.get(model, num_replicas)
        self._wanted[model] = num_replicas
        self._recorder.admit(model)
        self._recorder.set("tandem_replicas_desired", num_replicas, model=model)
        if num_replicas != before:
            direction = "up" if num_replicas > before else "down"
            self._recorder.count("tandem_scaling_events_total", model=model, direction=direction)
            log.info("scaling model=%s from=%s to=%s", model, before, num_replicas)

    def render(self) -> str:
        """The exposition text of all processes that have pushed within `expiry_s`."""
        self._forget_the_dead()
        now = self._clock()
        snapshots = [self._recorder.snapshot()]
        for process, life in sorted(self._lives.items()):
            age = Series("tandem_snapshot_age_seconds", (), (now - life.seen,))
            snapshots.append(Snapshot(process, (*life.totals().values(), age)))
        return render(snapshots)

    # -- for the members -------------------------------------------------------------------------------------------

    def join(self, member: _Member) -> None:
        """A process has come. An older connection of the same name is cut: its process is gone or an impostor."""
        for other in list(self._members):
            if other.process == member.process:
                other.connection.abort("another process has joined under this name")
                self.leave(other)
        self._members.add(member)
        self._forget_the_dead()
        life = self._lives.get(member.process)
        if life is None or life.incarnation != member.incarnation:
            before = {} if life is None else {key: s for key, s in life.totals().items() if _is_cumulative(s)}
            self._lives[member.process] = _Life(member.incarnation, before, self._clock())
        log.info("joined process=%s", member.process)

    def leave(self, member: _Member) -> None:
        if member in self._members:
            self._members.discard(member)
            log.info("left process=%s", member.process)
            if member.entry is not None:
                self.announce()

    def push(self, member: _Member, snapshot: Snapshot) -> None:
        life = self._lives.get(member.process)
        if life is None:  # it was silent for so long that its series had ended
            life = self._lives[member.process] = _Life(member.incarnation, {}, self._clock())
        life.snapshot, life.seen = snapshot, self._clock()

    def register(self, member: _Member, entry: ReplicaEntry) -> None:
        """A replica is coming, or can be reached from now on; after a lost connection it says so again."""
        member.entry = entry
        life = self._lives.get(member.process)
        if life is not None and not life.has_registered:
            life.has_registered = True
            self._recorder.admit(entry.model)
            self._recorder.count("tandem_replica_starts_total", model=entry.model)
        self.announce()

    def announce(self) -> None:
        """Tell everybody which replicas there are."""
        entries = self.entries()
        for model in {entry.model for entry in entries}:
            self._recorder.admit(model)
        for model in self._recorder.models - {UNKNOWN_MODEL}:
            self._recorder.set(
                "tandem_replicas", sum(entry.model == model and entry.address != "" for entry in entries), model=model
            )
        for member in self._members:
            member.connection.send(wire.Entries(entries))

    def _meet(self, connection: Connection) -> None:
        connection.attach(_Member(self, connection))

    def _forget_the_dead(self) -> None:
        now = self._clock()
        for process, life in list(self._lives.items()):
            if now - life.seen > self._expiry_s:
                del self._lives[process]


def _is_cumulative(series: Series) -> bool:
    metric = METRICS.get(series.name)
    return metric is not None and metric.kind != "gauge"


class _Member:
    """A connected process, at the hub: a `Peer`."""

    def __init__(self, hub: Hub, connection: Connection):
        self.connection = connection
        self.process = ""
        self.incarnation = ""
        self.entry: ReplicaEntry | None = None
        self._hub = hub

    def received(self, frame: wire.Frame) -> None:
        if isinstance(frame, wire.Join):
            if self.process or not frame.process:
                raise wire.Malformed("Join comes once, with a name")
            self.process, self.incarnation = frame.process, frame.incarnation
            self._hub.join(self)
            self.connection.send(wire.Entries(self._hub.entries()))
        elif not self.process:
            raise wire.Malformed("the first frame must be Join")
        elif isinstance(frame, wire.Push):
            self._hub.push(self, frame.snapshot)
        elif isinstance(frame, wire.Register):
            self._hub.register(self, frame.entry)
        elif isinstance(frame, wire.Scrape):
            self.connection.send(wire.Exposition(frame.number, self._hub.render()))

    def gather(self) -> Iterable[bytes]:
        return ()

    def writable(self) -> None:
        """A list of replicas or a page of metrics is bounded: nothing waits for room."""

    def lost(self, reason: str) -> None:
        self._hub.leave(self)


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
        self._entries: list[ReplicaEntry] | None = None
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
            callback(self._entries)

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
            self._entries = frame.entries
            if self._entry in frame.entries:
                self._registered.set()
            if self._settling is None:
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
                connection = await connect(address, secret=self._secret, purpose=_PURPOSE, accepts=_TO_CLIENT)
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
        for callback in self._watchers:
            callback(self._entries or [])

    async def _push_regularly(self) -> None:
        while True:
            await asyncio.sleep(PUSH_PERIOD_S)
            self._push()

    def _push(self) -> None:
        if self._connection is not None and self._recorder is not None:
            self._connection.send(wire.Push(self._recorder.snapshot()))
