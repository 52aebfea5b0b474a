"""A replica as the gateway sees it: a `Backend` over a connection. The other end is `serve/channel_server.py`.

Everything a step of the engine gives this gateway's streams comes as one frame. A reader that is slow gets its events
in fewer, larger pieces and holds up nobody. Closing a stream sends `Cancel` at once. When the connection ends, the
streams raise `ReplicaLost`, or `Draining` where the replica had said that it would go.

Requests and tokens take the channel alone. Whoever counts a replica's work by other means (Ray Serve, which must not
end a replica that has some) is told by one call for all of it: an `Attend`, open while this gateway has streams there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable

from serve import wire
from serve.backend import EventStream, Load
from serve.connection import Connection, connect
from serve.errors import Draining, InvalidRequest, ReplicaLost, TandemError, Unavailable
from serve.events import Event
from serve.prefix_view import PrefixView
from serve.request import ModelCard, Request

log = logging.getLogger(__name__)

Attend = Callable[[str], Awaitable[None]]
"""Given a connection's session id: calls `ChannelServer.attend` there, which returns soon after the last stream."""
ATTEND_AGAIN_S = 1.0
"""Before a call that failed is made again."""

WINDOW = 64
"""Pieces of one stream that are sent and not yet taken by its reader. At 100 steps/s that is 0.6 s of output."""
WELCOME_S = 10.0

PURPOSE = "channel"
TO_SERVER: frozenset[type[wire.Frame]] = frozenset({wire.Hello, wire.Submit, wire.Cancel, wire.Credit, wire.TurnedAway})
TO_CLIENT: frozenset[type[wire.Frame]] = frozenset(
    {wire.Welcome, wire.Accepted, wire.Refused, wire.Step, wire.LoadReport, wire.PrefixReport, wire.Drain}
)


class ChannelClient:
    """A replica as a `Backend`. Made by `connect`."""

    def __init__(
        self, connection: Connection, session_id: str, attend: Attend | None, on_lost: Callable[[], None] | None
    ):
        self.replica_id = ""
        self.card: ModelCard
        self.bundle: dict[str, bytes] = {}
        self.is_alive = True
        self.is_draining = False
        """The replica takes nothing new; what is open goes on."""
        self._connection = connection
        self._session_id = session_id
        self._attend = attend
        self._attending: asyncio.Task[None] | None = None
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._streams: dict[int, _Incoming] = {}
        self._taken: dict[int, int] = {}
        self.prefixes = PrefixView()
        self._load = Load()
        self._unreported: dict[int, str] = {}
        """Stream → request id, of those that the last load report does not count."""
        self._welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loss = ""

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        secret: bytes,
        gateway_id: str,
        on_lost: Callable[[], None] | None = None,
        attend: Attend | None = None,
    ) -> ChannelClient:
        """Connect and learn what is served. `on_lost` is called once, when the connection ends by itself.

        Raises ReplicaLost. Every connection has a session id of its own: a call that outlives its connection can never
        meet a stream of the next one.
        """
        session_id = f"{gateway_id}/{secrets.token_hex(8)}"
        try:
            connection = await connect(address, secret=secret, purpose=PURPOSE, accepts=TO_CLIENT)
            client = cls(connection, session_id, attend, on_lost)
            connection.attach(client)
            connection.send(wire.Hello(session_id))
            try:
                await asyncio.wait_for(client._welcomed, WELCOME_S)
            except BaseException:
                await client.aclose()
                raise
        except TimeoutError:
            raise ReplicaLost(f"the replica at {address} does not answer") from None
        except Unavailable as error:
            raise ReplicaLost(f"the replica at {address} cannot be reached: {error.message}") from None
        client._be_attended()
        return client

    async def submit(self, request: Request) -> EventStream:
        """Return once the replica has accepted; raise what refused it, or ReplicaLost."""
        await self.check_health()
        if self.is_draining:
            raise Draining(f"replica {self.replica_id!r} is shutting down; send the request again")
        stream = _Incoming(self, next(self._numbers))
        self._streams[stream.number] = stream
        self._idle.clear()
        try:
            self._unreported[stream.number] = request.request_id
            self._send(stream, request)
            self._be_attended()
            await stream.accepted
        except BaseException:
            await stream.aclose()
            raise
        return stream

    def load(self) -> Load:
        """The replica's last report; it does not count `unreported`."""
        return self._load

    @property
    def unreported(self) -> Collection[str]:
        """Ids of the requests sent since the last report."""
        return self._unreported.values()

    def turn_away(self, work_s: float) -> None:
        """Tell the replica of work that it would have got, had it not so much already."""
        if self.is_alive:
            self._connection.send(wire.TurnedAway(work_s))

    async def check_health(self) -> None:
        """Raise ReplicaLost when the connection has ended."""
        if not self.is_alive:
            raise ReplicaLost(f"replica {self.replica_id!r} was lost: {self._loss}; send the request again")

    async def drain(self, timeout_s: float) -> None:
        """Send nothing new; return when this gateway's streams have ended or time is up. The replica goes on."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def aclose(self) -> None:
        """End the connection: what is open there is cancelled, its streams here raise ReplicaLost."""
        self._on_lost = None
        self._connection.close("closed by this gateway")
        await self._connection.wait_closed()

    # -- the peer of the connection --------------------------------------------------------------------------------

    def received(self, frame: wire.Frame) -> None:
        if isinstance(frame, wire.Step):
            self._step(frame)
        elif isinstance(frame, wire.LoadReport):
            self._load = frame.load
            self._unreported = {number: id for number, id in self._unreported.items() if number > frame.newest}
        elif isinstance(frame, wire.PrefixReport):
            self._learn(frame)
        elif isinstance(frame, wire.Accepted):
            if (stream := self._streams.get(frame.stream)) is not None:
                stream.accept()
        elif isinstance(frame, wire.Refused):
            self._fail(frame.stream, frame.failure.error())
        elif isinstance(frame, wire.Drain):
            self.is_draining = True
        elif isinstance(frame, wire.Welcome) and not self._welcomed.done():
            self.replica_id, self.card, self.bundle = frame.replica_id, frame.card, frame.bundle
            self._welcomed.set_result(None)

    def gather(self) -> Iterable[bytes]:
        if self._taken:
            taken, self._taken = self._taken, {}
            yield wire.encode(wire.Credit(list(taken.items())))

    def writable(self) -> None:
        """Requests and credits are small: nothing waits for room."""

    def lost(self, reason: str) -> None:
        self.is_alive, self._loss = False, reason
        if not self._welcomed.done():
            self._welcomed.set_exception(ReplicaLost(reason))
            self._welcomed.exception()
        loss = Draining if self.is_draining else ReplicaLost  # an end that was announced is nobody's fault
        for number in list(self._streams):
            self._fail(number, loss(f"replica {self.replica_id!r} was lost: {reason}; send the request again"))
        if self._attending is not None:
            self._attending.cancel()
        if self._on_lost is not None:
            self._on_lost()

    # -- for the streams -------------------------------------------------------------------------------------------

    def credit(self, number: int, taken: int) -> None:
        """Tell the replica that a reader is ready for more."""
        self._taken[number] = self._taken.get(number, 0) + taken
        self._connection.schedule()

    def cancel(self, number: int) -> None:
        """Nobody reads stream `number` any more."""
        if self._forget(number) is not None and self.is_alive:
            self._connection.send(wire.Cancel(number))

    def _step(self, step: wire.Step) -> None:
        for number, events in step.events:
            if (stream := self._streams.get(number)) is not None:
                stream.push(wire.EVENTS.unpack(events))
        for number in step.ended:
            if (stream := self._forget(number)) is not None:
                stream.end()
        for number, failure in step.failed:
            self._fail(number, failure.error())

    def _fail(self, number: int, error: TandemError) -> None:
        if (stream := self._forget(number)) is not None:
            stream.end(error)

    def _learn(self, report: wire.PrefixReport) -> None:
        if report.block_size < 1:
            raise wire.Malformed(f"block_size is {report.block_size}")
        try:
            self.prefixes.change(
                report.block_size, is_whole=report.is_whole, added=report.added, removed=report.removed
            )
        except ValueError as error:
            raise wire.Malformed(f"PrefixReport: {error}") from None

    def _forget(self, number: int) -> _Incoming | None:
        self._unreported.pop(number, None)
        stream = self._streams.pop(number, None)
        if not self._streams:
            self._idle.set()
        return stream

    def _send(self, stream: _Incoming, request: Request) -> None:
        (packed,) = wire.REQUESTS.pack([request])
        try:
            self._connection.send(wire.Submit(stream.number, packed))
        except wire.FrameTooLarge as error:
            raise InvalidRequest(f"the request is too large to be sent to a replica: {error}") from None

    def _be_attended(self) -> None:
        """See that a call is open while there are streams."""
        if self._attend is not None and (self._attending is None or self._attending.done()) and self.is_alive:
            self._attending = asyncio.create_task(self._keep_attended(self._attend))

    async def _keep_attended(self, attend: Attend) -> None:
        while True:
            try:
                await attend(self._session_id)
            except Exception as error:  # the streams are the channel's: they go on
                log.warning("not attended id=%s error=%r", self.replica_id, error)
                await asyncio.sleep(ATTEND_AGAIN_S)
            if not self._streams:
                return


class _Incoming:
    """A stream on the client's side: an `EventStream`. One reader."""

    __slots__ = ("_client", "_error", "_events", "_is_ended", "_pieces", "_waiter", "accepted", "number")

    def __init__(self, client: ChannelClient, number: int):
        self.number = number
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client = client
        self._events: list[Event] = []
        self._pieces = 0
        """Taken or waiting here, and not yet credited."""
        self._waiter: asyncio.Future[None] | None = None
        self._is_ended = False
        self._error: TandemError | None = None

    def __aiter__(self) -> _Incoming:
        return self

    async def __anext__(self) -> list[Event]:
        while not self._events:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._is_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        if self._pieces >= WINDOW // 2 and not self._is_ended:
            self._client.credit(self.number, self._pieces)
            self._pieces = 0
        return events

    async def aclose(self) -> None:
        """Cancel what is unfinished and end a pending read. Any number of times."""
        self._events, self._error = [], None
        self._client.cancel(self.number)
        self.end()

    def accept(self) -> None:
        if not self.accepted.done():
            self.accepted.set_result(None)

    def push(self, events: list[Event]) -> None:
        self._events.extend(events)
        self._pieces += 1
        self._wake()

    def end(self, error: TandemError | None = None) -> None:
        self._is_ended = True
        if not self.accepted.done():
            if error is None:
                self.accepted.cancel()
            else:
                self.accepted.set_exception(error)
        else:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
