"""How a channel ends: draining, closing, processes that die or hang. Streams end clean and jobs are freed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys

import pytest
from channels import ROOT, SECRET, joined, run, served, tokens, until
from fake_backend import FakeBackend, request

from serve.channel import ChannelClient
from serve.errors import Draining, ReplicaLost
from serve.events import TokenDelta


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


def test_a_server_that_closes_ends_its_streams_with_draining(address):
    async def test() -> None:
        backend = FakeBackend()
        lost = asyncio.Event()
        async with joined(backend, address, on_lost=lost.set) as (server, client):
            stream = await client.submit(request())
            await server.aclose()
            with pytest.raises(Draining, match="shutting down"):
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
