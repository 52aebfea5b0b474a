"""uvicorn's HTTP/1.1 protocol (httptools) with limits on what a client may send, how fast, and how slowly it may read.

uvicorn with httptools accepts headers without end, never closes a half-sent head, and waits forever for a client that
does not read. Here, per connection:

    head       max_header_bytes, max_headers → 431; header_timeout_s → 408
    body       body_timeout_s plus a grace (the middleware answers 408 first) → closed
    pipeline   more than a few requests ahead of their answers → closed
    close      with unread bytes on the way: the answer is flushed, the bytes dropped for a moment, then closed, since
               a reset would take the answer with it
    write      a full buffer not read within write_timeout_s → closed, which cancels the request
    number     max_connections → 503
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serve.errors import InvalidRequest, TandemError, Unavailable
from serve.gateway.errors import ClientTooSlow, HeadersTooLarge, answer
from serve.options import GatewayOptions

_quiet = logging.getLogger(f"{__name__}.uvicorn")
"""Instead of uvicorn's, which warns once for every broken request anybody sends."""
_quiet.setLevel(logging.ERROR)

MAX_PIPELINED = 16
WRITE_BUFFER_BYTES = 64 << 10
BODY_GRACE_S = 2.0
LINGER_S = 2.0
LINGER_BYTES = 16 << 20
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
}


@dataclass(slots=True)
class Limits:
    """What one server's connections share."""

    options: GatewayOptions
    refused_connection: Callable[[], None]
    is_leaving: bool = False
    """Every connection ends with its next answer that says so."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a connection has ended."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, config: Config, server_state: ServerState, limits: Limits) -> None:
        super().__init__(config, server_state, {})
        self.logger = _quiet
        self._limits = limits
        self._options = limits.options
        self._in_head = True
        self._head_bytes = 0
        self._has_ended_message = False
        """With the bytes at hand: most of them may be its body, none of them need be the next head."""
        self._fields_bytes = 0
        self._refusal: TandemError | None = None
        self._unread = False
        self._receiving: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def leave(self, idle_s: float) -> None:
        """End with the next answer that says so, or when nothing has come for `idle_s`.

        An answer that has begun without saying so leaves the connection open: its client sends the next request as soon
        as it has the last byte, and if that met a close it would read a reset."""
        self.timeout_keep_alive = idle_s  # type: ignore[assignment]  # call_later takes it
        if not self.is_busy:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(idle_s, self.timeout_keep_alive_handler)
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        lingering = LingeringTransport(transport, has_unread=lambda: self._unread or self._receiving is not None)
        super().connection_made(lingering)  # type: ignore[arg-type]  # it passes on what it does not change
        if len(self.connections) > self._options.max_connections:
            self._limits.refused_connection()
            self._refuse(Unavailable("too many connections; close idle ones, or try again soon", retry_after_s=1.0))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_receiving()
        self._stop_writing()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self._limits.gone.set()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self.transport.drop(len(data))  # type: ignore[attr-defined]
            return
        if self._in_head and self._receiving is None:
            self._await_head()
        self._has_ended_message = False
        super().data_received(data)
        if self._in_head and not self._has_ended_message and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self._options.max_header_bytes:
                self._refuse(self._too_large())

    # Parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._fields_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)
        if len(self.headers) > self._options.max_headers:
            self._stop_parsing(
                HeadersTooLarge(f"the request has more than {self._options.max_headers} headers; send fewer")
            )

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop_receiving()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing(InvalidRequest("too many requests were sent ahead of their answers"))
        names = [name for name, _ in self.headers]
        if names.count(b"host") > 1 or names.count(b"content-length") > 1:
            self._stop_parsing(InvalidRequest("a header that must stand once stands twice"))
        if b"content-length" in names and b"transfer-encoding" in names:
            self._stop_parsing(InvalidRequest("Content-Length and Transfer-Encoding exclude each other"))
        super().on_headers_complete()
        if self._limits.is_leaving and self.cycle is not None:
            self.cycle.keep_alive = False
        limit = self._options.body_timeout_s + BODY_GRACE_S
        self._receiving = self.loop.call_later(limit, self._body_too_slow)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_receiving()
        self._in_head = self._has_ended_message = True

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what the parser refused; here with the reason, and in our shape."""
        self._refuse(self._refusal or InvalidRequest("this is not valid HTTP"))

    # Flow

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_writing()
        self._writing = self.loop.call_later(self._options.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    # Private

    def _await_head(self) -> None:
        self._receiving = self.loop.call_later(self._options.header_timeout_s, self._head_too_slow)

    def _head_too_slow(self) -> None:
        self._receiving = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # bytes of the next request came early; the one being answered goes on
            return
        self._refuse(ClientTooSlow(f"the request's head did not arrive within {self._options.header_timeout_s:g} s"))

    def _body_too_slow(self) -> None:
        self._receiving = None
        self.transport.abort()

    def _count(self, num_bytes: int) -> None:
        self._fields_bytes += num_bytes
        if self._fields_bytes > self._options.max_header_bytes:
            self._stop_parsing(self._too_large())

    def _too_large(self) -> TandemError:
        return HeadersTooLarge(f"the request's head is larger than {self._options.max_header_bytes} bytes; send less")

    def _stop_parsing(self, refusal: TandemError) -> None:
        """Raise out of the parser; it reports an error and `send_400_response` answers."""
        self._refusal = refusal
        raise httptools.HttpParserError(refusal.message)

    def _refuse(self, refusal: TandemError) -> None:
        """Answer and close, unless another request is being answered here: then just close."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_raw(refusal))
        self._unread = True
        self.transport.close()
        self._stop_receiving()

    def _stop_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


class LingeringTransport:
    """A transport whose `close` lets the client read the answer first when bytes from it are still coming.

    Closing a socket with unread bytes resets the connection, and the client may never see what was written. So: end
    our side, drop what comes for a moment, then close.
    """

    def __init__(self, transport: asyncio.Transport, *, has_unread: Callable[[], bool]) -> None:
        self._transport = transport
        self._has_unread = has_unread
        self._is_closing = False
        self._num_dropped = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._is_closing = True
        if not self._has_unread() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)

    def drop(self, num_bytes: int) -> None:
        """Bytes that came after `close`."""
        self._num_dropped += num_bytes
        if self._num_dropped > LINGER_BYTES:
            self._transport.abort()


def _raw(refusal: TandemError) -> bytes:
    """An answer outside ASGI."""
    failed = answer(refusal)
    headers: dict[str, Any] = {
        "content-type": "application/json",
        "content-length": len(failed.body),
        **dict(failed.headers),
        "connection": "close",
    }
    lines = [f"HTTP/1.1 {failed.status} {_PHRASES.get(failed.status, 'Error')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + failed.body
