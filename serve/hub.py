"""The hub: which replicas there are, and what every process has counted. Everybody keeps one connection to it.

    replica ── Register, Push         ──▶       ──▶ Entries, Change ── gateway   a change reaches all gateways at once
    gateway ── Follow, Push, Scrape   ──▶  Hub  ──▶ Exposition ── gateway        any gateway's /metrics is the hub's

A registration lasts as long as its connection. Snapshots are cumulative and replace each other; a process that stops
pushing is shown for `expiry_s` more. When a process comes back under its name before that, its counters go on from
where its last life ended, so that none ever falls. The hub keeps nothing on disk: after a restart clients reconnect,
register and push again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from serve import wire
from serve.connection import Connection
from serve.exposition import render
from serve.hub_client import PURPOSE, TO_HUB
from serve.listener import Listener
from serve.metrics import METRICS, Series, Snapshot
from serve.recorder import Recorder
from serve.registry import Registry
from serve.wire import ReplicaEntry

log = logging.getLogger(__name__)

EXPIRY_S = 15.0


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
        self.registry = Registry(self._recorder)
        self._listener = Listener(secret, PURPOSE, accepts=TO_HUB, on_ready=self._meet)
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
        return self.registry.entries()

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
            self.registry.unfollow(member.tell)
            log.info("left process=%s", member.process)
            if member.entry is not None:
                self.registry.remove(member.entry)

    def push(self, member: _Member, snapshot: Snapshot) -> None:
        life = self._lives.get(member.process)
        if life is None:  # it was silent for so long that its series had ended
            life = self._lives[member.process] = _Life(member.incarnation, {}, self._clock())
        life.snapshot, life.seen = snapshot, self._clock()

    def register(self, member: _Member, entry: ReplicaEntry) -> None:
        """A replica is coming, or can be reached from now on; after a lost connection it says so again."""
        if member.entry is not None and member.entry.replica_id != entry.replica_id:
            self.registry.remove(member.entry)
        member.entry = entry
        life = self._lives.get(member.process)
        if life is not None and not life.has_registered:
            life.has_registered = True
            self._recorder.admit(entry.model)
            self._recorder.count("tandem_replica_starts_total", model=entry.model)
        self.registry.put(entry)
        member.connection.send(wire.Change([entry], []))

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
        self._due: list[bytes] = []

    def tell(self, frame: bytes) -> None:
        self._due.append(frame)
        self.connection.schedule()

    def received(self, frame: wire.Frame) -> None:
        if isinstance(frame, wire.Join):
            if self.process or not frame.process:
                raise wire.Malformed("Join comes once, with a name")
            self.process, self.incarnation = frame.process, frame.incarnation
            self._hub.join(self)
        elif not self.process:
            raise wire.Malformed("the first frame must be Join")
        elif isinstance(frame, wire.Push):
            self._hub.push(self, frame.snapshot)
        elif isinstance(frame, wire.Register):
            self._hub.register(self, frame.entry)
        elif isinstance(frame, wire.Follow):
            self._hub.registry.follow(self.tell)
        elif isinstance(frame, wire.Scrape):
            self.connection.send(wire.Exposition(frame.number, self._hub.render()))

    def gather(self) -> Iterable[bytes]:
        due, self._due = self._due, []
        return due

    def writable(self) -> None:
        """A list of replicas, its changes or a page of metrics are bounded: nothing waits for room."""

    def lost(self, reason: str) -> None:
        self._hub.leave(self)
