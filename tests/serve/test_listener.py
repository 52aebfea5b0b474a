"""Who may connect, and where: proofs of the secret, garbage, limits, addresses."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
from channels import SECRET, joined, run, served, tokens
from fake_backend import FakeBackend, request

from serve import channel, connection, listener, wire
from serve.backend import Load
from serve.channel import ChannelClient
from serve.channel_server import ChannelServer
from serve.connection import Connection
from serve.errors import InvalidRequest, ReplicaLost, RequestFailed
from serve.events import TokenDelta

# -- strangers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["secret", "purpose"])
def test_who_cannot_prove_the_secret_is_cut_off(address, wrong):
    async def test() -> None:
        backend = FakeBackend()
        async with served(backend, address) as (server, actual):
            with pytest.raises(Exception, match="proved that they share a secret"):
                await connection.connect(
                    actual, secret=b"x" * 32 if wrong == "secret" else SECRET,
                    purpose="hub" if wrong == "purpose" else channel.PURPOSE, accepts=channel.TO_CLIENT,
                )  # fmt: skip
            assert not server.sessions

    run(test)


def test_a_client_proves_its_server_too(address):
    """An impostor that accepts everybody learns no frame."""

    async def test() -> None:
        heard = bytearray()

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(connection._MAGIC + b"n" * 32)
            heard.extend(await reader.readexactly(len(connection._MAGIC) + 64))
            writer.write(b"m" * 32)
            heard.extend(await reader.read())
            writer.close()

        server = await asyncio.start_unix_server(impostor, address.removeprefix("unix:"))
        with pytest.raises(ReplicaLost, match="does not know the secret"):
            await ChannelClient.connect(address, secret=SECRET, gateway_id="gateway-0")
        assert SECRET not in heard and len(heard) == len(connection._MAGIC) + 64
        server.close()

    run(test)


def test_a_recorded_proof_is_worth_nothing(address):
    async def test() -> None:
        backend = FakeBackend()
        async with served(backend, address) as (server, actual):
            sent: list[bytes] = []
            original = Connection._proof

            def recording(self: Connection, role: bytes, *nonces: bytes) -> bytes:
                proof = original(self, role, *nonces)
                sent.append(proof)
                return proof

            Connection._proof = recording  # type: ignore[method-assign]
            try:
                client = await ChannelClient.connect(actual, secret=SECRET, gateway_id="gateway-0")
            finally:
                Connection._proof = original  # type: ignore[method-assign]
            for proof in sent:
                reader, writer = await asyncio.open_unix_connection(actual.removeprefix("unix:"))
                await reader.readexactly(len(connection._MAGIC) + 32)
                writer.write(connection._MAGIC + client._connection._nonce + proof)
                assert await reader.read() == b""
                writer.close()
            assert len(server.sessions) == 1
            await client.aclose()

    run(test)


def test_who_takes_too_long_or_comes_in_crowds_is_cut_off(address, monkeypatch):
    monkeypatch.setattr(connection, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(listener, "MAX_STRANGERS", 3)

    async def test() -> None:
        async with served(FakeBackend(), address) as (_, actual):
            path = actual.removeprefix("unix:")
            strangers = [await asyncio.open_unix_connection(path) for _ in range(5)]
            greetings = [await reader.read(100) for reader, _ in strangers]
            assert [bool(greeting) for greeting in greetings] == [True, True, True, False, False]
            for reader, writer in strangers:
                assert await reader.read() == b""
                writer.close()
            client = await ChannelClient.connect(actual, secret=SECRET, gateway_id="gateway-0")
            await client.aclose()

    run(test)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100, b"\0" * 200, b"TANDEM\xff" + b"\0" * 64, os.urandom(500)]
)
def test_garbage_before_the_proof_is_cut_off(address, garbage):
    async def test() -> None:
        async with served(FakeBackend(), address) as (server, actual):
            reader, writer = await asyncio.open_unix_connection(actual.removeprefix("unix:"))
            writer.write(garbage)
            assert len(await reader.read()) == len(connection._MAGIC) + 32
            writer.close()
            assert not server.sessions

    run(test)


@pytest.mark.parametrize(
    "garbage",
    [
        wire.HEADER.pack(wire.MAX_FRAME_BYTES + 1, 3),
        wire.HEADER.pack(4, 99) + b"abcd",
        wire.encode(wire.Accepted(1)),
        wire.encode(wire.Hello("again")),
        wire.encode(wire.Submit(1, wire.REQUESTS.pack([request()])[0])) * 2,
    ],
    ids=["too large", "unknown kind", "wrong direction", "second hello", "stream twice"],
)
def test_a_malformed_frame_ends_its_connection_and_no_other(address, garbage):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, good), joined(FakeBackend(), address + "2"):
            lost = asyncio.Event()
            bad = await ChannelClient.connect(address, secret=SECRET, gateway_id="bad", on_lost=lost.set)
            stream = await good.submit(request())
            bad._connection._transport.write(garbage)
            await lost.wait()
            backend.streams[0].end()
            assert await tokens(stream) == [] and good.is_alive

    run(test)


def test_an_answer_too_large_for_a_frame_fails_its_stream_alone(address, monkeypatch):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 2000)
            large, small = await client.submit(request("large")), await client.submit(request("small"))
            backend.streams[0].put(TokenDelta(0, tuple(range(5000))))
            backend.streams[1].put(TokenDelta(0, (1,)))
            assert await anext(small) == [TokenDelta(0, (1,))]
            with pytest.raises(RequestFailed, match="too large"):
                await anext(large)

    run(test)


def test_a_request_too_large_for_a_frame_is_refused(address, monkeypatch):
    async def test() -> None:
        async with joined(FakeBackend(), address) as (_, client):
            monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 2000)
            with pytest.raises(InvalidRequest, match="too large"):
                await client.submit(request(prompt=range(5000)))
            assert client.load() == Load()

    run(test)


# -- addresses -----------------------------------------------------------------------------------------------------


def test_a_unix_socket_is_its_users_alone_and_is_taken_over_from_the_dead(address):
    async def test() -> None:
        path = Path(address.removeprefix("unix:"))
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(path))
        dead.close()
        async with served(FakeBackend(), address):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with pytest.raises(OSError, match="in use"):
                await ChannelServer(FakeBackend(), {}, secret=SECRET, replica_id="other").start(address)
        assert not path.exists()

    run(test)


@pytest.mark.parametrize("everywhere", ["tcp:0.0.0.0:0", "tcp:[::]:0"])
def test_listening_on_every_address_is_refused(everywhere):
    async def test() -> None:
        server = ChannelServer(FakeBackend(), {}, secret=SECRET, replica_id="replica-0")
        with pytest.raises(ValueError, match="name one address"):
            await server.start(everywhere)
        await server.aclose()

    run(test)


def test_connecting_where_nothing_listens_says_so(address):
    async def test() -> None:
        for nowhere in (address, "tcp:127.0.0.1:1"):
            with pytest.raises(ReplicaLost, match="cannot be reached: nothing answers"):
                await ChannelClient.connect(nowhere, secret=SECRET, gateway_id="gateway-0")

    run(test)


def test_a_short_secret_is_refused(address):
    async def test() -> None:
        async with served(FakeBackend(), address) as (_, actual):
            with pytest.raises(ValueError, match="at least 16"):
                await ChannelClient.connect(actual, secret=b"short", gateway_id="gateway-0")

    run(test)


def test_a_listener_takes_the_first_free_port_of_its_range_and_says_when_there_is_none():
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            first = taken.getsockname()[1]
            full, wide = f"tcp:127.0.0.1:{first}-{first}", f"tcp:127.0.0.1:{first}-{min(first + 50, 65535)}"
            server = ChannelServer(FakeBackend(), {}, secret=SECRET, replica_id="r")
            with pytest.raises(OSError, match="every port from"):
                await server.start(full)
            assert first < wire.Address.parse(await server.start(wide)).port <= first + 50
            await server.aclose()

    run(test)
