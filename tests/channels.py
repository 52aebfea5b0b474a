"""A replica's end of the channel over a fake backend, a gateway's end, and what their tests share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fake_backend import FakeBackend

from serve.channel import ChannelClient
from serve.channel_server import ChannelServer
from serve.events import TokenDelta

SECRET = b"s" * 32
BUNDLE = {"tokenizer.json": b"{}"}
ROOT = Path(__file__).resolve().parent.parent


@contextlib.asynccontextmanager
async def served(backend: FakeBackend, address: str) -> AsyncIterator[tuple[ChannelServer, str]]:
    server = ChannelServer(backend, BUNDLE, secret=SECRET, replica_id="replica-0")
    try:
        yield server, await server.start(address)
    finally:
        await server.aclose()


@contextlib.asynccontextmanager
async def joined(
    backend: FakeBackend, address: str, **options: Any
) -> AsyncIterator[tuple[ChannelServer, ChannelClient]]:
    async with served(backend, address) as (server, actual):
        client = await ChannelClient.connect(actual, secret=SECRET, gateway_id="gateway-0", **options)
        try:
            yield server, client
        finally:
            await client.aclose()


def run(test: Callable[[], Awaitable[None]], limit_s: float = 20.0) -> None:
    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await test()

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until something that is under way has arrived."""
    while not condition():
        await asyncio.sleep(0)


async def tokens(stream: Any) -> list[int]:
    return [
        token
        for events in [e async for e in stream]
        for e in events
        if isinstance(e, TokenDelta)
        for token in e.token_ids
    ]
