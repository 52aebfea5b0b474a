"""A small HTTP/1.1 client on asyncio's protocols and httptools: pieces of an answer as they arrive, with their times.

It shares the cores with the server when both run on one machine, and what a client library costs would be counted as
the server's: how much is in `loadtest/results/loadtest.md`. Bytes are timed in the callback that receives them, before
anything waits for its turn in the event loop. Connections are kept and used again. No redirects, no proxies, no HTTP/2.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

OnPiece = Callable[[float, bytes], None]
"""Called with the time (perf_counter) and the bytes of a part of a 200's body."""
ERROR_BYTES = 2000
"""Of an error's body, kept for the message."""


class HttpError(Exception):
    """The server could not be reached, broke off, or answered with another status than 200."""

    def __init__(self, message: str, status: int = 0, retry_after: str = ""):
        super().__init__(message)
        self.status = status
        """0: there was no answer, or not a whole one."""
        self.retry_after = retry_after


@dataclass(slots=True)
class Server:
    """Where requests go, and the connections to there that are free."""

    host: str
    port: int
    headers: dict[str, str] = field(default_factory=dict)
    is_tls: bool = False
    root: str = ""
    """Path before every request's own."""
    _idle: list[Connection] = field(default_factory=list)

    @classmethod
    def at(cls, base_url: str, api_key: str = "", headers: dict[str, str] | None = None) -> Server:
        url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        is_tls = url.scheme == "https"
        every = {**({"Authorization": f"Bearer {api_key}"} if api_key else {}), **(headers or {})}
        return cls(
            url.hostname or "127.0.0.1", url.port or (443 if is_tls else 80), every, is_tls, url.path.rstrip("/")
        )

    async def post(self, path: str, body: bytes, on_piece: OnPiece) -> None:
        """Returns when the answer has ended. Raises HttpError; when cancelled, closes the connection, which is how a
        client tells a server that it has left."""
        await self._exchange("POST", path, body, on_piece)

    async def get(self, path: str) -> str:
        """The whole answer. Raises as `post` does."""
        pieces: list[bytes] = []
        await self._exchange("GET", path, b"", lambda _, piece: pieces.append(piece))
        return b"".join(pieces).decode()

    async def post_json(self, path: str, fields: dict[str, Any]) -> Any:
        pieces: list[bytes] = []
        await self.post(path, json.dumps(fields).encode(), lambda _, piece: pieces.append(piece))
        return json.loads(b"".join(pieces))

    async def events(self, path: str, body: bytes) -> AsyncGenerator[tuple[float, dict[str, Any]]]:
        """The events of a stream with the time of each. Closing it closes the connection."""
        queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
        reader = EventReader(lambda now, data: queue.put_nowait((now, data)))
        asking = asyncio.ensure_future(self.post(path, body, reader.feed))
        asking.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (found := await queue.get()) is not None:
                if found[1] == b"[DONE]":
                    break
                yield found[0], json.loads(found[1])
            else:
                await asking
        finally:
            asking.cancel()

    async def is_listening(self) -> bool:
        """Whether anybody takes connections there."""
        try:
            connection = await self._connect()
        except HttpError:
            return False
        connection.close()
        return True

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, method: str, path: str, body: bytes, on_piece: OnPiece) -> None:
        lines = [f"{method} {self.root}{path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        while True:
            is_fresh = not self._idle
            connection = await self._connect() if is_fresh else self._idle.pop()
            try:
                await connection.exchange(request, on_piece)
            except ConnectionReset:
                if is_fresh or connection.has_answer:
                    raise
                continue  # it was closed while idle, before the server saw the request
            finally:
                if connection.is_reusable:
                    self._idle.append(connection)
                else:
                    connection.close()
            return

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if self.is_tls else None
        try:
            _, connection = await loop.create_connection(Connection, self.host, self.port, ssl=context)
        except OSError as error:
            raise HttpError(f"connect: {error.strerror or type(error).__name__}") from error
        return connection


class ConnectionReset(HttpError):
    """The connection ended before the answer did."""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.has_answer = False
        """Whether a byte has come for the present request."""
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[None] | None = None
        self._on_piece: OnPiece | None = None
        self._error = b""
        self._retry_after = ""
        self._now = 0.0
        self._keeps_alive = True

    @property
    def is_reusable(self) -> bool:
        return self._done is None and self._keeps_alive and self._transport is not None

    async def exchange(self, request: bytes, on_piece: OnPiece) -> None:
        """Send and read to the end of the answer. Raises HttpError and ConnectionReset."""
        if self._transport is None:
            raise ConnectionReset("the connection was closed while idle")
        self._parser = httptools.HttpResponseParser(self)
        self._on_piece, self._error, self._retry_after, self.has_answer = on_piece, b"", "", False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        self._done = None
        status = self._parser.get_status_code()
        if status != 200:
            raise HttpError(f"{status}: {_message(self._error)}", status, self._retry_after)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self.has_answer = True
        if self._parser is not None:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as error:
                self._fail(HttpError(f"not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail(ConnectionReset(f"connection lost: {type(error).__name__ if error else 'closed by the server'}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_body(self, piece: bytes) -> None:
        assert self._parser is not None and self._on_piece is not None
        if self._parser.get_status_code() == 200:
            self._on_piece(self._now, piece)
        elif len(self._error) < ERROR_BYTES:
            self._error += piece

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self._keeps_alive = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: HttpError) -> None:
        self._keeps_alive = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class EventReader:
    """Server-sent events out of pieces that know nothing of their borders."""

    def __init__(self, on_event: OnPiece):
        """`on_event`: called with the time of its last byte and the bytes behind `data: `."""
        self._on_event = on_event
        self._rest = bytearray()

    def feed(self, now: float, piece: bytes) -> None:
        self._rest += piece
        if b"\n" not in piece:
            return
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(now, line[5:].strip())


def _message(body: bytes) -> str:
    """An error's words, in OpenAI's shape or any."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        return str(error.get("code") or error.get("message") or error)[:200] if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        return body[:200].decode("utf-8", "replace")
