"""The channel between a gateway and a replica: requests one way, the steps' events the other. Here the replica's side.

    gateway:  ChannelClient ── one connection ── ChannelServer  :replica          frames: serve/wire.py
              (a Backend)                        (over a Backend)                 connection: serve/connection.py

Everything that becomes ready in one turn of the event loop, that is the events of an engine step, leaves as one `Step`
frame with one write. Each stream has a window of `WINDOW` pieces: a reader that does not take them stops the server
from reading that stream, so its events merge in the engine's own stream and leave later as fewer, larger pieces; its
neighbours notice nothing. When a connection ends, all that the gateway had open is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import aclosing

from serve import wire
from serve.backend import Backend, EventStream, Load
from serve.channel import PURPOSE, TO_SERVER, WINDOW
from serve.connection import Connection
from serve.errors import Draining, RequestFailed, TandemError
from serve.events import Event
from serve.listener import Listener
from serve.request import Request
from serve.text.prefix_digest import PrefixDigest

log = logging.getLogger(__name__)

LOAD_PERIOD_S = 0.1
"""Between two reports of a load that changes; until then gateways add their own estimate of what they have sent."""


ATTENDED_S = 0.5
"""For how long a connection without streams is attended: requests that follow each other make one call, not many."""


class ChannelServer:
    """Offers one backend to gateways."""

    def __init__(
        self,
        backend: Backend,
        bundle: dict[str, bytes],
        *,
        secret: bytes,
        replica_id: str,
        digest: PrefixDigest | None = None,
    ):
        """`digest`: of the prefixes that the backend has cached, to be told to gateways."""
        self.backend = backend
        self.digest = digest
        self.bundle = bundle
        self.replica_id = replica_id
        self.is_draining = False
        self.turned_away_s = 0.0
        """Seconds of work that gateways have refused because of the wait here."""
        self.sessions: dict[str, _Session] = {}
        self._listener = Listener(secret, PURPOSE, accepts=TO_SERVER, on_ready=self._meet)
        self._reporting: asyncio.Task[None] | None = None

    async def start(self, address: str) -> str:
        """Listen and return the actual address. Raises ValueError and OSError."""
        self._reporting = asyncio.create_task(self._report_load())
        return await self._listener.start(address)

    async def attend(self, session_id: str) -> None:
        """Return when that connection has had no stream for `ATTENDED_S`, or has ended."""
        newest = -1
        while (session := self.sessions.get(session_id)) is not None and (session.streams or session.newest != newest):
            newest = session.newest
            await asyncio.sleep(ATTENDED_S)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, tell every gateway, and return when the accepted ones have ended or time is up."""
        self.is_draining = True
        for session in self.sessions.values():
            session.connection.send(wire.Drain())
        await self.backend.drain(timeout_s)
        pumps = [outgoing.task for session in self.sessions.values() for outgoing in session.streams.values()]
        if pumps:
            await asyncio.wait(pumps, timeout=1.0)  # the last events are in the streams: let them leave

    async def aclose(self) -> None:
        """End every stream with `Draining`, every connection, and the socket."""
        self.is_draining = True
        if self._reporting is not None:
            self._reporting.cancel()
        for session in list(self.sessions.values()):
            session.shut()
        await self._listener.aclose()

    def _meet(self, connection: Connection) -> None:
        connection.attach(_Session(self, connection))

    async def _report_load(self) -> None:
        while True:
            await asyncio.sleep(LOAD_PERIOD_S)
            for session in self.sessions.values():
                session.is_report_due = True
                session.connection.schedule()


class _Outgoing:
    """A stream on the server's side: the task that moves its events, and how far its reader is behind."""

    __slots__ = ("credit", "task", "window")

    def __init__(self) -> None:
        self.task: asyncio.Task[None]
        self.window = WINDOW
        self.credit = asyncio.Event()
        """Set when there may be room again."""


class _Session:
    """One gateway's connection, on the server's side: a `Peer`."""

    def __init__(self, server: ChannelServer, connection: Connection):
        self.connection = connection
        self.streams: dict[int, _Outgoing] = {}
        self._server = server
        self._gateway_id = ""
        self._events: dict[int, list[Event]] = {}
        self._ended: list[int] = []
        self._failed: list[tuple[int, wire.Failure]] = []
        self.is_report_due = True
        self._reported: Load | None = None
        self.newest = 0
        """The highest number of a stream so far."""
        self._told: int | None = None
        """The state of the digest that this gateway knows."""

    def received(self, frame: wire.Frame) -> None:
        if isinstance(frame, wire.Hello):
            self._welcome(frame)
        elif not self._gateway_id:
            raise wire.Malformed("the first frame must be Hello")
        elif isinstance(frame, wire.Submit):
            self.open(frame.stream, wire.REQUESTS.unpack([frame.request])[0])
        elif isinstance(frame, wire.TurnedAway):
            self._server.turned_away_s += frame.work_s
        elif isinstance(frame, wire.Cancel):
            if (outgoing := self.streams.get(frame.stream)) is not None:
                outgoing.task.cancel()
        elif isinstance(frame, wire.Credit):
            for stream, taken in frame.taken:
                if (outgoing := self.streams.get(stream)) is not None:
                    outgoing.window += taken
                    outgoing.credit.set()

    def open(self, stream: int, request: Request) -> None:
        """Start answering. Raises Malformed when the stream exists."""
        if stream in self.streams:
            raise wire.Malformed(f"stream {stream} is opened twice")
        self.newest = max(self.newest, stream)
        outgoing = self.streams[stream] = _Outgoing()
        outgoing.task = asyncio.create_task(self._answer(stream, outgoing, request))
        outgoing.task.add_done_callback(lambda _: self.streams.pop(stream, None))

    def fail(self, stream: int, error: TandemError) -> None:
        self._failed.append((stream, wire.Failure.of(error)))
        self.connection.schedule()

    def gather(self) -> Iterable[bytes]:
        """One `Step` with everything since the last one, and the load when it has changed."""
        if self._events or self._ended or self._failed:
            events = [(stream, wire.EVENTS.pack(events)) for stream, events in self._events.items()]
            ended, failed = self._ended, self._failed
            self._events, self._ended, self._failed = {}, [], []
            try:
                yield wire.encode(wire.Step(events, ended, failed))
            except wire.FrameTooLarge:
                yield from self._one_by_one(events)
                yield wire.encode(wire.Step([], ended, failed))
        if self._gateway_id and self.is_report_due:
            self.is_report_due = False
            yield from self._report()

    def writable(self) -> None:
        for outgoing in self.streams.values():
            outgoing.credit.set()

    def lost(self, reason: str) -> None:
        """The gateway is gone: free everything it had open."""
        if self._server.sessions.get(self._gateway_id) is self:
            del self._server.sessions[self._gateway_id]
            log.info("gateway lost id=%s streams=%s reason=%r", self._gateway_id, len(self.streams), reason)
        for outgoing in self.streams.values():
            outgoing.task.cancel()

    def shut(self) -> None:
        """End every stream: the replica is going."""
        for stream, outgoing in self.streams.items():
            self.fail(stream, Draining(f"replica {self._server.replica_id!r} is shutting down"))
            outgoing.task.cancel()

    def _report(self) -> Iterable[bytes]:
        """What has changed of load and cached prefixes."""
        load = self._server.backend.load()
        if load != self._reported:
            self._reported = load
            yield wire.encode(wire.LoadReport(load, self.newest))
        digest = self._server.digest
        if digest is not None and (change := digest.since(self._told)) is not None:
            self._told = change.mark
            yield wire.encode(wire.PrefixReport(digest.block_size, change.is_whole, change.added, change.removed))

    def _one_by_one(self, events: list[tuple[int, list[Event]]]) -> Iterable[bytes]:
        """A frame a stream. What alone exceeds a frame fails its stream: no request should ask for that much."""
        for stream, packed in events:
            try:
                yield wire.encode(wire.Step([(stream, packed)], [], []))
            except wire.FrameTooLarge as error:
                failure = wire.Failure.of(RequestFailed(f"the answer is too large to be sent: {error}"))
                yield wire.encode(wire.Step([], [], [(stream, failure)]))
                if (outgoing := self.streams.get(stream)) is not None:
                    outgoing.task.cancel()

    def _welcome(self, hello: wire.Hello) -> None:
        if self._gateway_id or not hello.gateway_id or hello.gateway_id in self._server.sessions:
            raise wire.Malformed("Hello comes once, with a name of its own")
        self._gateway_id = hello.gateway_id
        self._server.sessions[hello.gateway_id] = self
        server = self._server
        self.connection.send(wire.Welcome(server.replica_id, server.backend.card, server.bundle))
        if server.is_draining:
            self.connection.send(wire.Drain())

    async def _answer(self, stream: int, outgoing: _Outgoing, request: Request) -> None:
        """From submission to the last event. Cancelling closes the backend's stream."""
        try:
            if self._server.is_draining:
                raise Draining(f"replica {self._server.replica_id!r} is shutting down; send the request again")
            events = await self._server.backend.submit(request)
        except Exception as error:
            refusal = wire.Failure.of(_as_tandem_error(error, request.request_id))
            self.connection.send(wire.Refused(stream, refusal))
            return
        async with aclosing(events):
            self.connection.send(wire.Accepted(stream))
            try:
                await self._move(stream, outgoing, events)
            except Exception as error:
                self.fail(stream, _as_tandem_error(error, request.request_id))
            else:
                self._ended.append(stream)
                self.connection.schedule()

    async def _move(self, stream: int, outgoing: _Outgoing, events: EventStream) -> None:
        connection = self.connection
        async for piece in events:
            self._events.setdefault(stream, []).extend(piece)
            connection.schedule()
            outgoing.window -= 1
            while outgoing.window <= 0 or not connection.is_writable:
                outgoing.credit.clear()
                await outgoing.credit.wait()


def _as_tandem_error(error: Exception, request_id: str) -> TandemError:
    if isinstance(error, TandemError):
        return error
    log.error("request failed id=%s", request_id, exc_info=error)
    return RequestFailed(f"computing the request failed: {type(error).__name__}")
