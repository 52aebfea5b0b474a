"""A gateway with streams at a replica has one call open there, for whoever counts the replica's work by its calls."""

from __future__ import annotations

import asyncio

import pytest
from channels import joined, run, served, tokens, until
from fake_backend import FakeBackend, request

from serve import channel, channel_server
from serve.channel_server import ChannelServer
from serve.events import TokenDelta


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(channel_server, "ATTENDED_S", 0.0)
    monkeypatch.setattr(channel, "ATTEND_AGAIN_S", 0.0)


class Calls:
    """Brings attendance to `server` as a handle call does, and keeps the calls."""

    server: ChannelServer
    """Set before the first stream; the call of the connection itself finds none."""

    def __init__(self) -> None:
        self.open: list[asyncio.Task[None]] = []
        self.num_made = 0

    async def __call__(self, session_id: str) -> None:
        self.num_made += 1
        self.open.append(asyncio.create_task(self.server.attend(session_id)))
        try:
            await self.open[-1]
        finally:
            self.open.pop().cancel()


def test_one_call_is_open_while_there_are_streams_however_many(address):
    async def test() -> None:
        backend, calls = FakeBackend(), Calls()
        async with joined(backend, address, attend=calls) as (calls.server, client):
            streams = [await client.submit(request()) for _ in range(3)]
            for source in backend.streams:
                source.put(TokenDelta(0, (1,)))
                source.end()
                assert calls.num_made == len(calls.open) == 1
            assert [await tokens(stream) for stream in streams] == [[1]] * 3
            await until(lambda: not calls.open)
            await client.submit(request())
            await until(lambda: len(calls.open) == 1)

    run(test)


def test_a_call_that_fails_is_made_again_and_the_streams_go_on(address):
    attempts = 0

    async def attend(session_id: str) -> None:
        nonlocal attempts
        attempts += 1
        raise OSError("the actor cannot be reached")

    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address, attend=attend) as (_, client):
            stream = await client.submit(request())
            await until(lambda: attempts > 3)
            backend.streams[0].put(TokenDelta(0, (1,)))
            backend.streams[0].end()
            assert await tokens(stream) == [1]

    run(test)


def test_attendance_ends_with_the_connection(address):
    async def test() -> None:
        backend = FakeBackend()
        async with served(backend, address) as (server, _):
            await server.attend("a connection that never was")
        calls = Calls()
        async with joined(backend, address) as (calls.server, client):
            await client.submit(request())
            attending = asyncio.create_task(calls.server.attend(next(iter(calls.server.sessions))))
            await client.aclose()
            await attending

    run(test)


def test_a_new_connection_is_attended_at_once(address):
    """On Ray the first call is what makes Serve's router start to follow which replicas are in service."""

    async def test() -> None:
        made = asyncio.Event()

        async def attend(session_id: str) -> None:
            made.set()

        async with joined(FakeBackend(), address, attend=attend):
            await made.wait()

    run(test)
