"""Requests that reach the replica by another way (Ray's handle call) and are answered over the channel."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from channels import joined, run, served, tokens, until
from fake_backend import FakeBackend, request

from serve.channel_server import ChannelServer
from serve.errors import Draining, InvalidRequest, ReplicaLost
from serve.events import TokenDelta


class Carrier:
    """Brings requests to `server` as a handle call does, and keeps the calls."""

    server: ChannelServer

    def __init__(self) -> None:
        self.calls: list[asyncio.Task[None]] = []

    async def __call__(self, gateway_id: str, stream_id: int, asked: Any) -> None:
        self.calls.append(asyncio.create_task(self.server.run(gateway_id, stream_id, asked)))
        await self.calls[-1]


def test_a_carried_request_is_answered_over_the_channel_and_its_call_lasts_as_long(address):
    async def test() -> None:
        backend = FakeBackend()
        carrier = Carrier()
        async with joined(backend, address, carrier=carrier) as (carrier.server, client):
            stream = await client.submit(request())
            backend.streams[0].put(TokenDelta(0, (1,)))
            assert await anext(stream) == [TokenDelta(0, (1,))]
            assert not carrier.calls[0].done()
            backend.streams[0].end()
            assert await tokens(stream) == []
            await carrier.calls[0]
            with pytest.raises(InvalidRequest):
                await client.submit(request(max_tokens=1 << 30))
            with pytest.raises(InvalidRequest):
                await carrier.calls[1]

    run(test)


def test_closing_a_carried_stream_cancels_its_call_and_a_cancelled_call_ends_its_stream(address):
    async def test() -> None:
        backend = FakeBackend()
        carrier = Carrier()
        async with joined(backend, address, carrier=carrier) as (carrier.server, client):
            first, second = await client.submit(request()), await client.submit(request())
            await first.aclose()
            await backend.streams[0].closed.wait()
            carrier.calls[1].cancel()
            with pytest.raises(ReplicaLost):
                await anext(second)
            await backend.streams[1].closed.wait()

    run(test)


def test_a_call_that_arrives_after_its_stream_was_closed_is_cancelled(address):
    """Ray may deliver late: the replica accepts a stream that nobody waits for."""

    async def test() -> None:
        backend = FakeBackend()
        deliver = asyncio.Event()
        running: list[asyncio.Task[None]] = []

        async def late(gateway_id: str, stream_id: int, asked: Any) -> None:
            await deliver.wait()
            await servers[0].run(gateway_id, stream_id, asked)

        async def carrier(*call: Any) -> None:
            running.append(asyncio.create_task(late(*call)))
            await asyncio.shield(running[0])

        servers: list[ChannelServer] = []
        async with joined(backend, address, carrier=carrier) as (server, client):
            servers.append(server)
            submitting = asyncio.create_task(client.submit(request()))
            await until(lambda: bool(running))
            submitting.cancel()
            await asyncio.wait({submitting})
            deliver.set()
            await backend.submitted.wait()
            await backend.streams[0].closed.wait()

    run(test)


@pytest.mark.parametrize(("failure", "error"), [(OSError("actor died"), ReplicaLost), (Draining("going"), Draining)])
def test_a_call_that_fails_fails_its_submission(address, failure, error):
    async def carrier(*call: Any) -> None:
        raise failure

    async def test() -> None:
        async with joined(FakeBackend(), address, carrier=carrier) as (_, client):
            with pytest.raises(error):
                await client.submit(request())

    run(test)


def test_a_call_for_a_connection_that_is_gone_is_refused(address):
    async def test() -> None:
        async with served(FakeBackend(), address) as (server, _):
            with pytest.raises(ReplicaLost):
                await server.run("gateway-9", 1, request())

    run(test)
