"""One generation as an HTTP answer, from acceptance to the last byte; closes everything whoever ends it.

    work    prepare → submit (awaited) → 200, pieces as they come, [DONE]      or one JSON answer
    watch   the client's disconnect, and heartbeats while the stream is silent

The 200 goes out with the first bytes, so whatever fails before them is a plain HTTP error. After them a failure is one
`error` event and no [DONE]. A client that leaves, a drain that runs out and a deadline all end `work` by cancelling it,
and its `finally` closes the streams: that is what cancels the jobs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.errors import DeadlineExceeded, TandemError
from serve.gateway.choices import Piece
from serve.gateway.context import RequestContext
from serve.gateway.drain import Drain
from serve.gateway.errors import ClientGone, answer, error_event
from serve.gateway.generation import Generation
from serve.gateway.telemetry import Telemetry
from serve.gateway.usage import usage
from serve.gateway.wire import DONE, HEARTBEAT, Envelope, Format, encode_json, event

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""The engine enforces deadlines; when it does not answer at all, the gateway does this much later."""

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be submitted."""

    generation: Generation
    format: Format
    envelope: Envelope
    num_prompt_tokens: int
    timeout_s: float


class Exchange(Response):
    """An ASGI response that does the work itself, so that one place sees the client, the jobs and the drain."""

    def __init__(
        self,
        prepare: Callable[[], Awaitable[Prepared]],
        *,
        is_stream: bool,
        context: RequestContext,
        telemetry: Telemetry,
        drain: Drain,
        heartbeat_s: float,
    ) -> None:
        self.background = None
        self.status_code = 200
        self._prepare = prepare
        self._is_stream = is_stream
        self._context = context
        self._telemetry = telemetry
        self._drain = drain
        self._heartbeat_s = heartbeat_s
        self._work: asyncio.Task[None] | None = None
        self._cause: TandemError | None = None
        self._has_started = False
        self._is_silent = True
        self._is_over = False
        self._writing = asyncio.Lock()

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
        if self._work.cancelled():
            error: BaseException | None = self._cause or ClientGone("the server cancelled the request")
        else:
            error = self._work.exception()
        if error is not None:
            await self._fail(error, send)

    def _abort(self, error: TandemError) -> None:
        """End the work with `error`; the first cause counts."""
        if self._work is not None and not self._work.done() and self._cause is None:
            self._cause = error
            self._work.cancel()

    async def _answer(self, send: Send) -> None:
        prepared = await self._prepare()
        generation = prepared.generation
        late = DeadlineExceeded(f"the request took longer than {prepared.timeout_s:g} s")
        timer = asyncio.get_running_loop().call_later(prepared.timeout_s + GRACE_S, self._abort, late)
        try:
            await generation.start()
            self._telemetry.accepted(self._context, prepared.num_prompt_tokens)
            stopwatch = self._telemetry.stopwatch(self._context)
            try:
                async with aclosing(generation.pieces()) as batches:
                    if self._is_stream:
                        async for pieces in batches:
                            stopwatch.saw(pieces)
                            await self._write(send, _events(pieces, prepared))
                    else:
                        collected: dict[int, list[Piece]] = {}
                        async for pieces in batches:
                            stopwatch.saw(pieces)
                            for piece in pieces:
                                collected.setdefault(piece.index, []).append(piece)
            finally:
                stopwatch.stop(generation.tokens())
        finally:
            timer.cancel()
            await generation.aclose()
        if self._is_stream:
            await self._write(send, _ending(prepared), is_last=True)
        else:
            await self._send_json(send, encode_json(prepared.format.whole(collected, generation)))

    async def _watch(self, receive: Receive, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    message = await receive()
            except TimeoutError:
                if self._is_stream and self._is_silent and self._context.is_accepted:
                    await self._write(send, HEARTBEAT)
                self._is_silent = True
                continue
            if message["type"] == "http.disconnect":
                self._abort(ClientGone("the client closed the connection"))
                return

    async def _write(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        if not data:
            return
        async with self._writing:
            if self._is_over:
                return  # a heartbeat that waited for the last write
            self._is_over = is_last
            self._is_silent = False
            if not self._has_started:
                self._has_started = True
                await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def _send_json(
        self, send: Send, body: bytes, status: int = 200, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        fields += [(name.encode(), value.encode()) for name, value in headers]
        self._has_started = True
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    async def _fail(self, error: BaseException, send: Send) -> None:
        self._context.error = error
        if not isinstance(error, TandemError):
            log.error("request failed id=%s", self._context.request_id, exc_info=error)
        if isinstance(error, ClientGone):
            return
        if self._has_started and self._is_stream:
            await self._write(send, error_event(error), is_last=True)
        elif not self._has_started:
            failed = answer(error)
            await self._send_json(send, failed.body, failed.status, failed.headers)


def _events(pieces: list[Piece], prepared: Prepared) -> bytes:
    """The server-sent events of one engine step."""
    chunks = [chunk for piece in pieces for chunk in prepared.format.chunks(piece, prepared.generation)]
    if prepared.envelope.has_running_usage:
        so_far = usage(prepared.generation.tokens())
        chunks = [{**chunk, "usage": so_far} for chunk in chunks]
    elif prepared.envelope.has_usage:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
    return b"".join(map(event, chunks))


def _ending(prepared: Prepared) -> bytes:
    if not prepared.envelope.has_usage:
        return DONE
    last = {**prepared.envelope.chunk(), "choices": [], "usage": usage(prepared.generation.tokens())}
    return event(last) + DONE
