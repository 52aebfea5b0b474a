"""One generation as an HTTP answer, from acceptance to the last byte; closes everything whoever ends it.

    work    prepare → submit (awaited) → 200, events as pieces come, the ending      or one JSON answer
    watch   the client's disconnect, and heartbeats while the stream is silent

The 200 goes out with the first bytes, so whatever fails before them is a plain HTTP error. After them a failure is one
error event and no ending. A client that leaves, a drain that runs out and a deadline all end `work` by cancelling it,
and its `finally` closes the streams: that is what cancels the jobs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.errors import DeadlineExceeded, TandemError
from serve.gateway.context import RequestContext
from serve.gateway.drain import Drain
from serve.gateway.errors import ClientGone, answer
from serve.gateway.prepared import Ready
from serve.gateway.wire import HEARTBEAT

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""The engine enforces deadlines; when it does not answer at all, the gateway does this much later."""
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Exchange(Response):
    """An ASGI response that does the work itself, so that one place sees the client, the jobs and the drain."""

    def __init__(
        self,
        prepare: Callable[[], Awaitable[Ready]],
        *,
        is_stream: bool,
        timeout_s: float,
        context: RequestContext,
        drain: Drain,
        heartbeat_s: float,
    ) -> None:
        self.background = None
        self.status_code = 200
        self._prepare = prepare
        self._is_stream = is_stream
        self._timeout_s = timeout_s
        self._context = context
        self._drain = drain
        self._heartbeat_s = heartbeat_s
        self._prepared: Ready | None = None
        self._work: asyncio.Task[None] | None = None
        self._cause: TandemError | None = None
        self._has_started = False
        self._is_silent = True
        self._is_over = False
        self._writing = asyncio.Lock()
        self._unsent: deque[bytes] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._work = asyncio.create_task(self._answer(send))
        watch = asyncio.create_task(self._watch(receive, send))
        try:
            with self._drain.abortable(self._abort):
                await asyncio.wait({self._work})
        finally:
            watch.cancel()
            self._work.cancel()
            await asyncio.gather(watch, self._work, return_exceptions=True)
            error = self._failure()
            if self._prepared is not None and self._context.is_accepted:
                self._prepared.meter.ended(error)
        if error is not None:
            await self._fail(error, send)

    def _failure(self) -> BaseException | None:
        """Why the work failed, once it is done."""
        if self._work is None or self._work.cancelled():
            return self._cause or ClientGone("the server cancelled the request")
        return self._work.exception()

    def _abort(self, error: TandemError) -> None:
        """End the work with `error`; the first cause counts."""
        if self._work is not None and not self._work.done() and self._cause is None:
            self._cause = error
            self._work.cancel()

    async def _answer(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        prepared = self._prepared = await self._prepare()
        generation = prepared.generation
        late = DeadlineExceeded(f"the request took longer than {self._timeout_s:g} s")
        timer = loop.call_at(began + self._timeout_s + GRACE_S, self._abort, late)
        collected: list[Any] = []
        try:
            await generation.start()
            self._context.is_accepted = True
            prepared.meter.accepted()
            async with aclosing(generation.pieces()) as batches:
                async for pieces in batches:
                    prepared.meter.saw(pieces)
                    if self._is_stream:
                        await self._write(send, await prepared.format.events(pieces))
                    else:
                        collected += pieces
        finally:
            timer.cancel()
            await generation.aclose()
        if self._is_stream:
            await self._write(send, [prepared.format.ending()], is_last=True)
        else:
            await self._send_json(send, await prepared.format.whole(collected))

    async def _watch(self, receive: Receive, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    message = await receive()
            except TimeoutError:
                if self._is_stream and self._is_silent and self._context.is_accepted:
                    await self._write(send, [HEARTBEAT])
                self._is_silent = True
                continue
            if message["type"] == "http.disconnect":
                self._abort(ClientGone("the client closed the connection"))
                return

    async def _write(self, send: Send, parts: Iterable[bytes], *, is_last: bool = False) -> None:
        """Send events, and before them what was left when a cancelled write ended between two parts of one."""
        async with self._writing:
            if self._is_over:
                return  # a heartbeat that waited for the last write
            self._unsent.extend(parts)
            if not self._unsent:
                return
            self._is_silent = False
            if not self._has_started:
                self._has_started = True
                await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            while self._unsent:
                more = not is_last or len(self._unsent) > 1
                await send({"type": "http.response.body", "body": self._unsent[0], "more_body": more})
                self._unsent.popleft()
            self._is_over = is_last

    async def _send_json(
        self, send: Send, parts: list[bytes], status: int = 200, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        fields = [(b"content-type", b"application/json"), (b"content-length", str(sum(map(len, parts))).encode())]
        fields += [(name.encode(), value.encode()) for name, value in headers]
        self._has_started = True
        await send({"type": "http.response.start", "status": status, "headers": fields})
        for number, part in enumerate(parts, start=1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    async def _fail(self, error: BaseException, send: Send) -> None:
        self._context.error = error
        if not isinstance(error, TandemError):
            log.error("request failed id=%s", self._context.request_id, exc_info=error)
        if isinstance(error, ClientGone):
            return
        if self._has_started and self._is_stream and self._prepared is not None:
            await self._write(send, [self._prepared.format.failure(error)], is_last=True)
        elif not self._has_started:
            failed = answer(error)
            await self._send_json(send, [failed.body], failed.status, failed.headers)
