"""From the engine's thread to readers: nothing lost, one wake-up a step, closing cancels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from serve.engine.job import Job
from serve.engine.stream import Outbox, Stream
from serve.errors import RequestFailed
from serve.events import FinishReason


def make_streams(number: int = 1) -> tuple[Outbox, list[Stream[Job]], list[str]]:
    cancelled: list[str] = []
    return Outbox(), [Stream(Job(id=str(i)), cancelled.append) for i in range(number)], cancelled


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def read_all(stream: AsyncIterator[list[int]]) -> list[list[int]]:
    return [outputs async for outputs in stream]


def test_a_read_takes_everything_since_the_last():
    async def main() -> None:
        outbox, (stream,), _ = make_streams()
        for output in 1, 2, 3:
            outbox.put(stream, output)
        outbox.flush()
        assert await anext(stream) == [1, 2, 3]
        outbox.put(stream, 4)
        outbox.end(stream, FinishReason.STOP)
        outbox.flush()
        assert await read_all(stream) == [[4]]
        assert stream.finish_reason is FinishReason.STOP
        assert await read_all(stream) == []

    asyncio.run(main())


def test_a_step_wakes_an_event_loop_once(monkeypatch):
    async def main() -> None:
        outbox, streams, _ = make_streams(256)
        readers = [asyncio.create_task(read_all(stream)) for stream in streams]
        await settle()
        loop, wake_ups = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: wake_ups.append(args) or call(*args))
        for step in range(3):
            for stream in streams:
                outbox.put(stream, step)
            outbox.flush()
            await settle()
            assert len(wake_ups) == step + 1
        outbox.flush()
        assert len(wake_ups) == 3  # nothing new, nobody woken
        for stream in streams:
            outbox.end(stream, FinishReason.LENGTH)
        outbox.flush()
        assert await asyncio.gather(*readers) == [[[0], [1], [2]]] * 256

    asyncio.run(main())


def test_a_busy_reader_is_not_woken(monkeypatch):
    async def main() -> None:
        outbox, (stream,), _ = make_streams()
        loop, wake_ups = asyncio.get_running_loop(), []
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: wake_ups.append(args))
        outbox.put(stream, 1)
        outbox.flush()
        assert wake_ups == [] and await anext(stream) == [1]

    asyncio.run(main())


def test_the_error_comes_after_the_outputs():
    async def main() -> None:
        outbox, (stream,), _ = make_streams()
        outbox.put(stream, 1)
        outbox.end(stream, FinishReason.ERROR, RequestFailed("broken"))
        assert await anext(stream) == [1]
        for _ in range(2):
            with pytest.raises(RequestFailed, match="broken"):
                await anext(stream)

    asyncio.run(main())


def test_closing_cancels_and_ends_a_pending_read():
    async def main() -> None:
        _, (stream,), cancelled = make_streams()
        reader = asyncio.create_task(read_all(stream))
        await settle()
        await stream.aclose()
        await stream.aclose()
        assert await reader == []
        assert cancelled == ["0", "0"]  # the engine does not mind
        assert await read_all(stream) == []

    asyncio.run(main())


def test_leaving_early_cancels_and_leaving_late_does_not():
    async def main() -> None:
        outbox, (early, late), cancelled = make_streams(2)
        for stream in early, late:
            outbox.put(stream, 1)
        outbox.end(late, FinishReason.STOP)
        for stream in early, late:
            async with aclosing(stream):
                async for _ in stream:
                    break
        assert cancelled == ["0"]

    asyncio.run(main())


def test_a_reader_whose_task_is_cancelled_can_read_on():
    async def main() -> None:
        outbox, (stream,), _ = make_streams()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.001)
        outbox.put(stream, 1)
        outbox.flush()
        assert await anext(stream) == [1]

    asyncio.run(main())


def test_a_reader_whose_event_loop_is_gone_is_cancelled():
    outbox, (stream,), cancelled = make_streams()
    loop = asyncio.new_event_loop()
    reader = loop.create_task(read_all(stream))
    loop.run_until_complete(settle())
    waiter = stream._waiter
    reader.cancel()
    loop.run_until_complete(settle())
    loop.close()
    stream._waiter = waiter  # as if the loop had ended between two looks
    outbox.put(stream, 1)
    outbox.flush()
    assert cancelled == ["0"]


def test_no_wake_up_is_lost_between_threads():
    num_outputs, num_streams = 2000, 8
    outbox, streams, _ = make_streams(num_streams)

    def write() -> None:
        for output in range(num_outputs):
            for stream in streams:
                outbox.put(stream, output)
            outbox.flush()
        for stream in streams:
            outbox.end(stream, FinishReason.STOP)
        outbox.flush()

    async def main() -> list[list[list[int]]]:
        writer = threading.Thread(target=write)
        writer.start()
        try:
            return await asyncio.wait_for(asyncio.gather(*(read_all(stream) for stream in streams)), 60)
        finally:
            writer.join()

    for reads in asyncio.run(main()):
        assert [output for read in reads for output in read] == list(range(num_outputs))


def test_without_an_event_loop_take_reads_what_is_there():
    outbox, (stream,), cancelled = make_streams()
    assert stream.take() == []
    outbox.put(stream, 1)
    outbox.put(stream, 2)
    assert stream.take() == [1, 2] and stream.take() == []
    stream.cancel()
    outbox.end(stream, FinishReason.CANCELLED)
    stream.cancel()
    assert stream.take() == [] and cancelled == ["0"]
