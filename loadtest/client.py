"""A small HTTP/1.1 client on plain sockets: server-sent events as they arrive, with the time of each.

It shares the cores with the server when both run on one machine, and what a client library costs would be counted as
the server's. One connection a request, unencrypted.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


class HttpError(Exception):
    """The server could not be reached, or answered with another status than 200; the message says with which."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    api_key: str = ""

    @classmethod
    def at(cls, base_url: str, api_key: str = "") -> Server:
        url = urlsplit(base_url)
        return cls(url.hostname or "127.0.0.1", url.port or 80, api_key)

    async def events(self, path: str, body: bytes) -> AsyncGenerator[tuple[float, dict[str, Any]]]:
        """POST `body` and yield every event of the stream with the time its last byte was read (perf_counter).

        Closing it closes the connection, which is how a client cancels. Raises HttpError, and IncompleteReadError when
        the connection breaks.
        """
        rest = b""
        async with aclosing(self._answer("POST", path, body)) as pieces:
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                now = time.perf_counter()
                for line in lines:
                    if line.startswith(b"data: [DONE]"):
                        return
                    if line.startswith(b"data: "):
                        yield now, json.loads(line[6:])

    async def get(self, path: str) -> str:
        """The whole answer. Raises as `events` does."""
        async with aclosing(self._answer("GET", path, b"")) as pieces:
            return b"".join([piece async for piece in pieces]).decode()

    async def _answer(self, method: str, path: str, body: bytes) -> AsyncGenerator[bytes]:
        """The answer's body as it comes."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        except OSError as error:
            raise HttpError(f"connect: {error.strerror or error}") from error
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{key}Connection: close\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            status = await reader.readline()
            is_chunked = False
            while line := (await reader.readline()).strip().lower():
                is_chunked |= line.startswith(b"transfer-encoding:") and line.endswith(b"chunked")
            async with aclosing(_pieces(reader, is_chunked)) as pieces:
                if b" 200 " not in status:
                    text = b"".join([piece async for piece in pieces])[-300:]
                    raise HttpError(f"{status.decode('latin-1').strip()}: {text.decode('utf-8', 'replace')}")
                async for piece in pieces:
                    yield piece
        finally:
            writer.close()


async def _pieces(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncGenerator[bytes]:
    """Without the framing. An event may come in several pieces, and several events in one."""
    if not is_chunked:
        while piece := await reader.read(1 << 16):
            yield piece
        return
    while size := int(await reader.readuntil(b"\n"), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
