"""The replicas this gateway can reach, by model: connects what the hub names, drops what it no longer names, submits.

A request is tried at the next replica when one refuses it for now or is lost before it has accepted. Once accepted it
outlives its replica (`failover.py`): the pool finds another one to go on, or waits for one to come up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from serve.backend import Backend, EventStream
from serve.errors import ConfigError, Draining, EngineDead, Overloaded, ReplicaLost, TandemError, Unavailable
from serve.gateway.catalog import Catalog
from serve.gateway.delivered import delivered
from serve.gateway.failover import MAX_LOST, PlacedStream, Placement, require_innocent, shortened
from serve.gateway.hold import Hold
from serve.gateway.routing import Candidate, Prediction, Router
from serve.gateway.shedding import Coming, Returns, too_late
from serve.gateway.suspects import Suspects
from serve.recorder import Recorder
from serve.request import Request
from serve.wire import ReplicaEntry

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
MAX_RETRY_S = 5.0
FAILOVER_WAIT_S = 30.0
"""How long a request that has lost its replica waits for one that takes it, since the last time that one was known to
load: a dead process is back and loading in 5 s (30 s on a busy Ray), large weights then take their minutes."""
MAX_KNOCK_S = 1.0
"""Pause between two tries at replicas that are full."""
_ELSEWHERE = (Overloaded, Draining, ReplicaLost, EngineDead)
"""Refusals another replica may not share."""


class Remote(Backend, Candidate, Protocol):
    """A connected replica (`ChannelClient`)."""

    is_draining: bool
    """It takes nothing new."""

    @property
    def bundle(self) -> Mapping[str, bytes]: ...

    @property
    def is_alive(self) -> bool: ...

    def turn_away(self, work_s: float) -> None:
        """Tell it of work that it would have got, had it not so much already."""
        ...


Connect = Callable[[ReplicaEntry, Callable[[], None]], Awaitable[Remote]]
"""Connect to a replica; the callable is called once when the connection is lost."""


@dataclass(frozen=True, slots=True)
class Census:
    """The replicas of one model, as this gateway sees them."""

    ready: int
    draining: int
    loading: int
    may_sleep: bool
    """It scales to zero: having none is no fault."""


@dataclass(slots=True, eq=False)
class _Member:
    """One replica, as long as the hub names it."""

    entry: ReplicaEntry
    remote: Remote | None = None
    joining: asyncio.Task[None] | None = None
    digest: bytes = b""
    """Of its tokenizer's files."""
    open: dict[object, str] = field(default_factory=dict)
    """A key of its own → its id, of every request that is there: ids may be equal."""
    is_dropped: bool = False


class Pool:
    """One per gateway; lives on its event loop."""

    def __init__(
        self,
        connect: Connect,
        router: Router | None = None,
        *,
        recorder: Recorder | None = None,
        hold: Hold | None = None,
        max_wait_s: float | None = None,
        failover_wait_s: float = FAILOVER_WAIT_S,
        configured: Collection[str] = (),
    ) -> None:
        """`configured`: the models that should have replicas, those that scale to zero among them."""
        self.models = Catalog()
        self.suspects = Suspects()
        self.hold = hold or Hold()
        self._max_wait_s = max_wait_s
        self._coming = Coming()
        self._returns = Returns()
        self._connect = connect
        self._router = router or Router()
        self._recorder = recorder or Recorder("gateway", "gateway")
        self._failover_wait_s = failover_wait_s
        self._configured = frozenset(configured)
        self._is_closed = False
        self._members: dict[str, _Member] = {}
        self._loading: list[ReplicaEntry] = []
        """Replicas that are coming."""
        self._closing: set[asyncio.Task[None]] = set()
        self._joined = asyncio.Event()
        """Set, and replaced by a new one, whenever a replica joins."""

    def update(self, entries: Sequence[ReplicaEntry]) -> None:
        """The hub's list: connect to new replicas, drop the others once their streams have ended."""
        named = {entry.replica_id: entry for entry in entries if entry.address}
        self._loading = [entry for entry in entries if not entry.address]
        self._coming.update(entry for entry in entries if not entry.address)
        self.models.expect(entries)
        for replica_id, member in list(self._members.items()):
            if named.get(replica_id) != member.entry:
                self._drop(member)
        for replica_id, entry in named.items():
            if replica_id not in self._members:
                member = self._members[replica_id] = _Member(entry)
                member.joining = asyncio.create_task(self._join(member))

    def retire(self, replica_ids: Collection[str]) -> None:
        """Send these nothing new; what is open there goes on."""
        for replica_id in replica_ids:
            member = self._members.get(replica_id)
            if member is not None and member.remote is not None:
                member.remote.is_draining = True

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken: by some replica, or to wait for one."""
        return any(_is_open(member) for member in self._members.values()) or bool(self.hold.models)

    def census(self) -> dict[str, Census]:
        """Every model that is configured or has replicas, by name."""
        names = self._configured | {member.entry.model for member in self._members.values()}
        return {name: self._count_replicas(name) for name in sorted(names | {entry.model for entry in self._loading})}

    def _count_replicas(self, model: str) -> Census:
        up = [each.remote for each in self._members.values() if each.entry.model == model and _is_up(each)]
        num_draining = sum(remote is not None and remote.is_draining for remote in up)
        num_loading = sum(entry.model == model for entry in self._loading)
        return Census(len(up) - num_draining, num_draining, num_loading, may_sleep=model in self.hold.models)

    def awaited(self, model: str) -> asyncio.Event | None:
        """None when a replica of `model` takes new requests, else what is set when one has joined."""
        is_there = any(_is_open(member) and member.entry.model == model for member in self._members.values())
        return None if is_there else self._joined

    def return_s(self, model: str) -> float | None:
        """When those who waited for a replica of `model` in vain should come back: when one that loads is due, else
        after what loading takes. None when none has ever told."""
        if not self.models.knows(model):
            return None
        due_s = self._due_s(model)
        return self.models[model].card.load_s if due_s is None else due_s

    async def meet(self, models: Collection[str]) -> None:
        """Return when every one of `models` can be served from here."""
        while not set(models) <= {member.entry.model for member in self._members.values() if _is_up(member)}:
            await self._joined.wait()

    async def submit(self, request: Request) -> EventStream:
        """Return once a replica has accepted. Raises what the last replica refused with, Overloaded before others."""
        lost: list[str] = []
        began = asyncio.get_running_loop().time()
        try:
            placement = await self._place(request, lost, is_new=True)
        except ReplicaLost:
            if len(lost) < MAX_LOST:
                raise
            placement = None
        seen = delivered(request, self.models[request.model].card)
        stream = PlacedStream(request, placement, self, seen, lost, began)
        if placement is None:
            await stream.begin()
        return stream

    async def place_again(
        self, request: Request, lost: list[str], until: float | None, fingerprint: str | None
    ) -> Placement:
        """For a request that has lost its replica: wait for one to take it, `failover_wait_s` or until its deadline.

        Raises what the last one refused with, DeadlineExceeded, Quarantined."""
        with self.hold.waking(request.model):
            return await self._wait_for_place(request, lost, until, fingerprint)

    async def _wait_for_place(
        self, request: Request, lost: list[str], until: float | None, fingerprint: str | None
    ) -> Placement:
        loop, pause = asyncio.get_running_loop(), FIRST_RETRY_S
        last_try = loop.time() + self._failover_wait_s
        while True:
            joined, num_lost = self._joined, len(lost)
            try:
                return await self._place(shortened(request, until, loop.time()), lost, fingerprint)
            except Unavailable:
                if len(lost) > max(num_lost, MAX_LOST - 1):
                    raise
                if any(entry.model == request.model for entry in self._loading):
                    last_try = loop.time() + self._failover_wait_s
                left = (last_try if until is None else min(last_try, until)) - loop.time()
                if left <= 0 or self._is_closed or self._is_replaced(request.model, fingerprint):
                    raise
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(joined.wait(), min(pause, left))
            pause = min(2 * pause, MAX_KNOCK_S)

    def moved(self, request: Request) -> None:
        self._count("tandem_failovers_total", request)

    def gave_up(self, request: Request) -> None:
        self._count("tandem_quarantines_total", request)

    def _count(self, name: str, request: Request) -> None:
        self._recorder.admit(request.model)
        self._recorder.count(name, model=request.model)

    async def aclose(self) -> None:
        self._is_closed = True
        for member in list(self._members.values()):
            self._drop(member, now=True)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _is_replaced(self, model: str, fingerprint: str | None) -> bool:
        """Whether an update has left no replica of that fingerprint: those that come will be like those there are."""
        there = [member.entry.fingerprint for member in self._members.values() if member.entry.model == model]
        return fingerprint is not None and bool(there) and fingerprint not in there

    def _due_s(self, model: str) -> float | None:
        """Until the next replica that loads may be up."""
        return self._coming.due_s(model, self.models[model].card.load_s)

    async def _place(
        self, request: Request, lost: list[str], fingerprint: str | None = None, *, is_new: bool = False
    ) -> Placement:
        """At the best replica that takes it. `lost` takes those whose connection ends meanwhile; with `MAX_LOST` in it
        this raises Quarantined, or ReplicaLost where others had the same losses. Only replicas of that fingerprint may;
        without one, those whose tokenizer has read the request, if there are any."""
        able = self._able(request.model, fingerprint)
        refusals: list[TandemError] = []
        spared: Prediction | None = None
        for ranked in self._router.rounds(request, able):
            taking = [prediction for prediction in ranked if not able[prediction.replica_id].is_draining]
            spared = spared or next(iter(taking), None)
            if is_new:
                due_s = self._due_s(request.model)
                late = too_late(request, taking, max_wait_s=self._max_wait_s, due_s=due_s)
                if late is not None:
                    refusals.append(late)
                    continue
            for prediction in sorted(ranked, key=lambda prediction: prediction.replica_id in lost):
                placement = await self._try(request, prediction, able[prediction.replica_id], lost, refusals)
                if placement is not None:
                    return placement
        overloads = [refusal for refusal in refusals if isinstance(refusal, Overloaded)]
        if overloads:
            refusal = min(overloads, key=lambda refusal: refusal.retry_after_s or 0.0)
            if spared is not None:
                able[spared.replica_id].turn_away(spared.work_s)  # it is asked for all the same
                if is_new:
                    num_soon = sum(entry.model == request.model for entry in self._loading)
                    work_s = spared.work_s / (num_soon + sum(not remote.is_draining for remote in able.values()))
                    refusal.retry_after_s = self._returns.book(request.model, refusal.retry_after_s or 0.0, work_s)
            raise refusal
        if refusals:
            raise refusals[-1]
        if self._is_replaced(request.model, fingerprint):
            raise ReplicaLost(
                f"the replica was lost, and those that {request.model} has now are of another version, which would not "
                f"go on with the same answer; send the request again"
            )
        due_s = self._due_s(request.model)
        raise Unavailable(f"no replica of {request.model} is ready; try again soon", retry_after_s=due_s)

    def _able(self, model: str, fingerprint: str | None) -> dict[str, Remote]:
        """The replicas that may have a request of that model."""
        up = [member for member in self._members.values() if member.entry.model == model]
        if fingerprint is not None:
            up = [member for member in up if member.entry.fingerprint == fingerprint]
        able = [(member, remote) for member in up if (remote := member.remote) is not None and remote.is_alive]
        newest = self.models[model].digest
        if fingerprint is None and any(member.digest == newest for member, _ in able):
            able = [(member, remote) for member, remote in able if member.digest == newest]
        return {member.entry.replica_id: remote for member, remote in able}

    async def _try(
        self, request: Request, prediction: Prediction, remote: Remote, lost: list[str], refusals: list[TandemError]
    ) -> Placement | None:
        """None when the replica refuses for now, which `refusals` then has, or was lost while another one refused."""
        member = self._members.get(prediction.replica_id)
        if member is None or member.remote is not remote:
            return None
        self._router.record(request, prediction)
        member.open[key := object()] = request.request_id
        leave, note_loss = partial(self._ended, member, key), partial(self._note_loss, member)
        try:
            stream = await remote.submit(request)
        except BaseException as refusal:
            has_died = isinstance(refusal, ReplicaLost) and not _is_up(member)
            if has_died:
                note_loss()
            leave()
            if not isinstance(refusal, _ELSEWHERE):
                raise
            refusals.append(refusal)
            if has_died and prediction.replica_id not in lost:  # or it is the death that is known already
                lost.append(prediction.replica_id)
                require_innocent(request, lost, self)
                if len(lost) >= MAX_LOST:
                    raise
            return None
        return Placement(prediction.replica_id, member.entry.fingerprint, stream, leave, note_loss)

    async def _join(self, member: _Member) -> None:
        """Connect, trying again with growing pauses while the hub names the replica."""
        entry, pause = member.entry, FIRST_RETRY_S
        while True:
            try:
                remote = await self._connect(entry, lambda: self._lost(member))
                member.digest = (await self.models.learn(entry.model, remote.card, remote.bundle)).digest
                if remote.is_alive:
                    break
                self._close(remote)
            except (OSError, TandemError, TimeoutError, EOFError) as error:
                log.warning("replica not reached id=%s error=%r", entry.replica_id, error)
                if isinstance(error, ConfigError):
                    return  # its files will be the same next time
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RETRY_S)
        member.remote = remote
        joined, self._joined = self._joined, asyncio.Event()
        joined.set()
        log.info("replica joined id=%s model=%s", entry.replica_id, entry.model)

    def _lost(self, member: _Member) -> None:
        """The connection ended. The hub may name the replica for a while yet: try to get it back."""
        remote, member.remote = member.remote, None
        self._note_loss(member)
        self._router.forget(member.entry.replica_id)
        if remote is not None:
            self._close(remote)
        if not member.is_dropped and (member.joining is None or member.joining.done()):
            log.warning("replica lost id=%s", member.entry.replica_id)
            member.joining = asyncio.create_task(self._join(member))

    def _note_loss(self, member: _Member) -> None:
        self.suspects.record(member.entry.replica_id, member.open.values())

    def _drop(self, member: _Member, *, now: bool = False) -> None:
        """Send it nothing more; close the connection when its streams have ended."""
        self._members.pop(member.entry.replica_id, None)
        member.is_dropped = True
        if member.joining is not None:
            member.joining.cancel()
        if now or not member.open:
            self._release(member)

    def _release(self, member: _Member) -> None:
        remote, member.remote = member.remote, None
        if remote is not None:
            self._close(remote)

    def _close(self, remote: Remote) -> None:
        task = asyncio.create_task(remote.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _ended(self, member: _Member, key: object) -> None:
        """One of the member's streams has ended."""
        del member.open[key]
        if member.is_dropped and not member.open:
            self._release(member)


def _is_up(member: _Member) -> bool:
    return member.remote is not None and member.remote.is_alive


def _is_open(member: _Member) -> bool:
    return member.remote is not None and member.remote.is_alive and not member.remote.is_draining
