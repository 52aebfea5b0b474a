"""The channel: acceptance, events, cancellation and back-pressure between a gateway and a replica."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
from channels import BUNDLE, joined, run, tokens, until
from fake_backend import FakeBackend, finished, request

from serve import channel, channel_server, wire
from serve.backend import Load
from serve.channel import ChannelClient
from serve.errors import InvalidRequest, Overloaded, RequestFailed
from serve.events import TokenDelta

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


def test_load_is_reported_on_change_with_what_it_counts(address):
    async def test() -> None:
        backend = FakeBackend()
        async with joined(backend, address) as (_, client):
            await client.submit(request())
            await until(lambda: client.load() == Load(running=1))
            assert not client.unreported
            submitting = asyncio.create_task(client.submit(request()))
            await asyncio.sleep(0)
            assert [*client.unreported] == [request().request_id]
            await submitting
            await until(lambda: client.load() == Load(running=2))
            assert not client.unreported
            backend.streams[0].closed.set()  # no step and no request goes with this change
            await until(lambda: client.load() == Load(running=1))

    run(test)


def test_work_that_was_turned_away_adds_up_at_the_replica(address):
    async def test() -> None:
        async with joined(FakeBackend(), address) as (server, client):
            client.turn_away(0.5)
            client.turn_away(2.0)
            await until(lambda: server.turned_away_s == 2.5)

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
            assert not client._streams and len(backend.requests) > 20

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
