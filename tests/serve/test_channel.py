"""The channel: acceptance, events, cancellation, back-pressure and loss between a gateway and a replica."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, finished, request

from serve import channel, channel_server, connection, listener, wire
from serve.backend import Load
from serve.channel import ChannelClient
from serve.channel_server import ChannelServer
from serve.connection import Connection
from serve.errors import Draining, InvalidRequest, Overloaded, ReplicaLost, RequestFailed
from serve.events import TokenDelta

SECRET = b"s" * 32
BUNDLE = {"tokenizer.json": b"{}"}
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def address(tmp_path) -> str:
    return f"unix:{tmp_path}/replica"


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


# -- asking and answering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_request_is_answered_with_the_backends_events(address, kind):
    async def test() -> None:
        backend = FakeBackend(period_s=0)
        async with joined(backend, address if kind == "unix" else "tcp:127.0.0.1:0") as (_, client):
            assert (client.replica_id, client.card, client.bundle) == ("replica-0", backend.card, BUNDLE)
            asked = request(max_tokens=300)
            stream = await client.submit(asked)
            assert backend.requests == [asked]
            events = [event async for events in stream for event in events]
            assert events == [*(TokenDelta(0, (i,)) for i in range(300)), finished(300)]
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await until(lambda: backend.num_open == 0)

    run(test)


@pytest.mark.parametrize(
    ("asked", "error"),
    [(request(max_tokens=1 << 30), InvalidRequest), (request(max_tokens=3), Overloaded)],
)
def test_a_refusal_is_raised_by_submit_as_the_backend_raised_it(address, asked, error):
    async def test() -> None:
        async with joined(FakeBackend(max_streams=0), address) as (_, client):
            with pytest.raises(error) as raised:
                await client.submit(asked)
            expected = (None, 1.5) if error is Overloaded else ("max_tokens", None)
            assert (raised.value.param, raised.value.retry_after_s) == expected

    run(test)


def test_a_failure_comes_after_the_events_before_it(address):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            stream = await client.submit(request())
            backend.streams[0].put(TokenDelta(0, (1,)))
            backend.streams[0].end(RequestFailed("the step failed"))
            assert await anext(stream) == [TokenDelta(0, (1,))]
            with pytest.raises(RequestFailed, match="the step failed"):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(test)


def test_an_unexpected_exception_fails_that_request_and_tells_nothing_of_it(address):
    class Broken(FakeBackend):
        async def submit(self, request: Any) -> Any:
            raise KeyError("secret prompt")

    async def test() -> None:
        async with joined(Broken(), address) as (_, client):
            with pytest.raises(RequestFailed) as raised:
                await client.submit(request())
            assert "secret" not in raised.value.message
            assert client.is_alive

    run(test)


def test_the_events_of_a_step_of_all_streams_arrive_in_one_frame(address, monkeypatch):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            streams = [await client.submit(request(str(i))) for i in range(20)]
            steps: list[wire.Step] = []
            take = client._step
            monkeypatch.setattr(client, "_step", lambda step: (steps.append(step), take(step)))
            for stream in backend.streams:
                stream.put(TokenDelta(0, (7,)))
            for stream in streams:
                assert await anext(stream) == [TokenDelta(0, (7,))]
            assert len(steps) == 1

    run(test)


def test_load_is_reported_on_change_and_counts_what_is_on_its_way(address):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            await client.submit(request())
            await until(lambda: client.load() == Load(running=1))
            submitting = asyncio.create_task(client.submit(request()))
            await asyncio.sleep(0)
            assert client.load() == Load(running=1, waiting=1)
            await submitting
            await until(lambda: client.load() == Load(running=2))
            backend.streams[0].closed.set()  # no step and no request goes with this change
            await until(lambda: client.load() == Load(running=1))

    run(test)


# -- cancelling ----------------------------------------------------------------------------------------------------


def test_closing_a_stream_closes_the_backends_at_once(address):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            stream = await client.submit(request())
            await stream.aclose()
            await stream.aclose()
            await asyncio.wait_for(backend.streams[0].closed.wait(), 1)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(test)


def test_closing_ends_a_read_that_waits(address):
    async def test() -> None:
        async with joined(FakeBackend(), address) as (_, client):
            stream = await client.submit(request())
            reading = asyncio.create_task(tokens(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            assert await reading == []

    run(test)


def test_cancelling_a_submission_leaves_nothing_behind(address):
    class Slow(FakeBackend):
        was_cancelled = False

        async def submit(self, request: Any) -> Any:
            self.submitted.set()
            try:
                return await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise

    async def test() -> None:
        backend = Slow()
        async with joined(backend, address) as (server, client):
            submitting = asyncio.create_task(client.submit(request()))
            await backend.submitted.wait()
            submitting.cancel()
            await until(lambda: backend.was_cancelled)
            (session,) = server.sessions.values()
            await until(lambda: not session.streams)

    run(test)


@pytest.mark.parametrize("seed", range(3))
def test_streams_read_closed_and_abandoned_at_random_leave_nothing_behind(address, seed):
    async def test() -> None:
        random_ = random.Random(seed)
        backend = FakeBackend(period_s=0, max_streams=40)

        async def client_of(client: ChannelClient) -> None:
            num_tokens = random_.choice((1, 5, 300))
            try:
                stream = await client.submit(request(max_tokens=num_tokens))
            except Overloaded:
                return
            stop_after = random_.choice((None, 0, 1, 3))
            got: list[int] = []
            async with contextlib.aclosing(stream):
                for _ in range(1 << 30 if stop_after is None else stop_after):
                    try:
                        events = await anext(stream)
                    except StopAsyncIteration:
                        break
                    got += [token for event in events if isinstance(event, TokenDelta) for token in event.token_ids]
                    for _ in range(random_.choice((0, 0, 20))):
                        await asyncio.sleep(0)
            assert got == list(range(num_tokens))[: len(got)] and (stop_after is not None or len(got) == num_tokens)

        async with joined(backend, address) as (server, client):
            asking = [asyncio.create_task(client_of(client)) for _ in range(60)]
            for submission in random_.sample(asking, 10):
                await asyncio.sleep(0)
                submission.cancel()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert not [result for result in results if result and not isinstance(result, asyncio.CancelledError)]
            (session,) = server.sessions.values()
            await until(lambda: backend.num_open == 0 and not session.streams)
            assert (client._streams, client._calls) == ({}, {}) and len(backend.requests) > 20

    run(test)


# -- slow readers --------------------------------------------------------------------------------------------------


def test_a_slow_reader_gets_fewer_larger_pieces_and_its_neighbour_notices_nothing(address):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            slow, fast = await client.submit(request("slow")), await client.submit(request("fast"))
            source, neighbour = backend.streams
            count = 20 * channel.WINDOW
            for token in range(count):
                source.put(TokenDelta(0, (token,)))
                neighbour.put(TokenDelta(0, (token,)))
                assert await anext(fast) == [TokenDelta(0, (token,))]
            assert len(source.reads) == channel.WINDOW  # then the server left the rest where it is
            source.end()
            assert await tokens(slow) == list(range(count))
            assert sum(source.reads) == count and len(source.reads) <= channel.WINDOW + 2

    run(test)


def test_a_gateway_that_does_not_read_its_socket_stops_the_server_reading_its_streams(address, monkeypatch):
    """A gateway whose event loop hangs: the replica's memory for it stays bounded by the write buffer."""
    monkeypatch.setattr(channel_server, "WINDOW", 1 << 30)

    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (server, client):
            stream = await client.submit(request())
            client._connection._transport.pause_reading()
            (session,) = server.sessions.values()
            piece, sent = TokenDelta(0, tuple(range(1 << 30, (1 << 30) + 10_000))), 0
            while session.connection.is_writable:
                backend.streams[0].put(piece)
                sent += 1
                await asyncio.sleep(0)
            for _ in range(100):
                backend.streams[0].put(piece)
                sent += 1
                await asyncio.sleep(0)
            assert len(backend.streams[0].reads) < sent - 90
            backend.streams[0].end()
            client._connection._transport.resume_reading()
            assert len(await tokens(stream)) == 10_000 * sent

    run(test)


# -- requests that come by another way -----------------------------------------------------------------------------


def test_a_carried_request_is_answered_over_the_channel_and_its_call_lasts_as_long(address):
    async def test() -> None:
        backend = FakeBackend()
        calls: list[asyncio.Task[None]] = []

        async def carrier(gateway_id: str, stream_id: int, asked: Any) -> None:
            calls.append(asyncio.create_task(servers[0].run(gateway_id, stream_id, asked)))
            await calls[-1]

        servers: list[ChannelServer] = []
        async with joined(backend, address, carrier=carrier) as (server, client):
            servers.append(server)
            stream = await client.submit(request())
            backend.streams[0].put(TokenDelta(0, (1,)))
            assert await anext(stream) == [TokenDelta(0, (1,))]
            assert not calls[0].done()
            backend.streams[0].end()
            assert await tokens(stream) == []
            await calls[0]
            with pytest.raises(InvalidRequest):
                await client.submit(request(max_tokens=1 << 30))
            with pytest.raises(InvalidRequest):
                await calls[1]

    run(test)


def test_closing_a_carried_stream_cancels_its_call_and_a_cancelled_call_ends_its_stream(address):
    async def test() -> None:
        backend = FakeBackend()
        calls: list[asyncio.Task[None]] = []

        async def carrier(gateway_id: str, stream_id: int, asked: Any) -> None:
            calls.append(asyncio.create_task(servers[0].run(gateway_id, stream_id, asked)))
            await calls[-1]

        servers: list[ChannelServer] = []
        async with joined(backend, address, carrier=carrier) as (server, client):
            servers.append(server)
            first, second = await client.submit(request()), await client.submit(request())
            await first.aclose()
            await backend.streams[0].closed.wait()
            calls[1].cancel()
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


# -- going ---------------------------------------------------------------------------------------------------------


def test_draining_refuses_new_requests_and_lets_the_open_ones_end(address):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (server, client):
            stream = await client.submit(request())
            draining = asyncio.create_task(server.drain(10))
            await until(lambda: client.is_draining)
            with pytest.raises(Draining):
                await client.submit(request())
            late = await ChannelClient.connect(address, secret=SECRET, gateway_id="gateway-1")
            with pytest.raises(Draining):
                await late.submit(request())
            assert not draining.done()
            backend.streams[0].put(TokenDelta(0, (1,)))
            backend.streams[0].end()
            assert await tokens(stream) == [1]
            await draining
            await late.aclose()

    run(test)


def test_a_server_that_closes_ends_its_streams_with_replica_lost(address):
    async def test() -> None:
        backend = FakeBackend()
        lost = asyncio.Event()
        async with joined(backend, address, on_lost=lost.set) as (server, client):
            stream = await client.submit(request())
            await server.aclose()
            with pytest.raises(ReplicaLost, match="shutting down"):
                await anext(stream)
            await lost.wait()
            with pytest.raises(ReplicaLost):
                await client.submit(request())
            await backend.streams[0].closed.wait()

    run(test)


def test_what_was_sent_before_the_end_arrives_though_the_reader_is_late_and_writes(address):
    """A write that crosses the other side's close must not throw away what lies unread in the socket."""

    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (server, client):
            stream = await client.submit(request())
            transport = client._connection._transport
            transport.pause_reading()
            backend.streams[0].put(TokenDelta(0, (1,)))
            backend.streams[0].end()
            await backend.streams[0].closed.wait()
            closing = asyncio.create_task(server.aclose())
            await asyncio.sleep(0.05)
            for _ in range(3):
                client.credit(99, 1)
                await asyncio.sleep(0.01)
            transport.resume_reading()
            assert await tokens(stream) == [1]
            await closing

    run(test)


def test_a_client_that_closes_ends_its_streams_and_frees_them(address):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            stream = await client.submit(request())
            await client.aclose()
            with pytest.raises(ReplicaLost):
                await anext(stream)
            await backend.streams[0].closed.wait()

    run(test)


REPLICA = """
import asyncio, sys
sys.path[:0] = [{root!r}, {tests!r}]
from fake_backend import FakeBackend
from serve.channel_server import ChannelServer

async def main():
    server = ChannelServer(FakeBackend(period_s=0.01), {{}}, secret={secret!r}, replica_id="replica-0")
    print(await server.start(sys.argv[1]), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

GATEWAY = """
import asyncio, sys
sys.path[:0] = [{root!r}, {tests!r}]
from fake_backend import request
from serve.channel import ChannelClient

async def main():
    client = await ChannelClient.connect(sys.argv[1], secret={secret!r}, gateway_id="gateway-0")
    streams = [await client.submit(request(max_tokens=1000000)) for _ in range(5)]
    print("streaming", flush=True)
    for stream in streams:
        async for _ in stream: pass

asyncio.run(main())
"""


async def child(program: str, address: str) -> tuple[asyncio.subprocess.Process, str]:
    """A process of its own, once it has said its line."""
    program = program.format(root=str(ROOT), tests=str(ROOT / "tests"), secret=SECRET)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, address, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().strip()


async def end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_raise_replica_lost_when_the_replicas_process_dies_or_hangs(fate):
    """SIGSTOP leaves the TCP connection open and silent, as a vanished host does."""

    async def test() -> None:
        process, address = await child(REPLICA, "tcp:127.0.0.1:0")
        try:
            client = await ChannelClient.connect(address, secret=SECRET, gateway_id="gateway-0")
            streams = [await client.submit(request(max_tokens=1_000_000)) for _ in range(5)]
            for stream in streams:
                await anext(stream)
            process.send_signal(fate)
            died = asyncio.get_running_loop().time()
            for stream in streams:
                with pytest.raises(ReplicaLost):
                    async for _ in stream:
                        pass
            assert asyncio.get_running_loop().time() - died < 5
            assert not client.is_alive
        finally:
            await end(process)

    run(test, 60)


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gateways_requests_are_freed_when_its_process_dies_or_hangs(address, fate):
    async def test() -> None:
        backend = FakeBackend(period_s=0.01)
        async with served(backend, address) as (_, actual):
            process, said = await child(GATEWAY, actual)
            try:
                assert (said, backend.num_open) == ("streaming", 5)
                process.send_signal(fate)
                died = asyncio.get_running_loop().time()
                for stream in backend.streams:
                    await stream.closed.wait()
                assert asyncio.get_running_loop().time() - died < 5
            finally:
                await end(process)

    run(test, 60)


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
