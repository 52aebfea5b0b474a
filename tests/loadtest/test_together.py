"""Text and images over HTTP: what the client makes of the bytes, and the report of a server with both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import gateway_fakes
import pytest
from gateway_fakes import FakeBackend, card, fake_gateway, ids
from image_device import ImageDevice, limits, make_scheduler

from loadtest import together
from loadtest.client import HttpError, Server
from serve.engine.engine import Engine
from serve.exposition import render
from serve.gateway.server import GatewayServer
from serve.image.backend import ImageBackend
from serve.image.trajectory import ImageBatch, ImageOutput
from serve.options import GatewayOptions
from serve.prefix_view import PrefixView
from serve.recorder import EngineObserver, Recorder


@contextlib.asynccontextmanager
async def answering(*parts: bytes, is_cut: bool = False) -> AsyncIterator[tuple[Server, asyncio.Event]]:
    """A server that answers everybody with `parts`, an HTTP chunk each, and tells when a client has left."""
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in parts:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if is_cut:
            writer.close()
            return
        if parts[-1].endswith(b"\n\n"):
            writer.write(b"0\r\n\r\n")
        await reader.read()
        left.set()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Server("127.0.0.1", server.sockets[0].getsockname()[1]), left


def test_events_are_whole_however_the_bytes_are_cut():
    async def scenario():
        whole = b'event: x\ndata: {"a": 1}\n\n: still working\n\ndata: {"b": "' + b"z" * 200_000 + b'"}\n\n'
        for size in (7919, 70_000, len(whole)):
            parts = [whole[start : start + size] for start in range(0, len(whole), size)]
            async with answering(*parts) as (server, _):
                found = [event async for _, event in server.events("/", b"{}")]
            assert found == [{"a": 1}, {"b": "z" * 200_000}]

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_leaving_the_events_closes_the_connection():
    async def scenario():
        async with answering(b'data: {"a": 1}\n\ndata: {"a": 2}\n') as (server, left):
            async with contextlib.aclosing(server.events("/", b"{}")) as events:
                await anext(events)
                assert not left.is_set()
            await asyncio.wait_for(left.wait(), 5)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_connection_that_breaks_is_an_error():
    async def scenario():
        async with answering(b'data: {"a": 1}\n\n', is_cut=True) as (server, _):
            with pytest.raises(HttpError, match="connection lost"):
                _ = [event async for event in server.events("/", b"{}")]
        with pytest.raises(HttpError, match="connect"):
            await server.get("/metrics")

    asyncio.run(asyncio.wait_for(scenario(), 20))


class SlowDevice(ImageDevice):
    """A few milliseconds a step, as a small model takes."""

    def collect(self, handle: ImageBatch) -> ImageOutput:
        threading.Event().wait(0.003)
        output = super().collect(handle)
        output.pixels = [bytes(3 * row.job.width * row.job.height) for row in handle.rows] if output.pixels else []
        return output


class LocalReplica(ImageBackend):
    """In this process, as the gateway's pool sees one."""

    replica_id = "replica-image"
    is_alive = True
    is_draining = False
    bundle: dict[str, bytes] = {}  # noqa: RUF012
    prefixes = PrefixView()
    unreported: tuple[str, ...] = ()


@contextlib.asynccontextmanager
async def both(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The URL of a gateway over a fake text model and a real image engine, with the metrics of both."""
    recorder = Recorder("replica-image", "replica")
    engine = Engine(make_scheduler(), SlowDevice(), observer=EngineObserver(recorder, "painter"))
    recorder.follow("tandem_requests_running", lambda: engine.load().running, model="painter")
    engine.start()
    images: Any = LocalReplica(engine, card("painter", kind="image", aliases=(), image=limits()))
    monkeypatch.setattr(gateway_fakes, "render", lambda snapshots: render([*snapshots, recorder.snapshot()]))
    async with fake_gateway(FakeBackend(reply=ids("x") * 8), images) as gateway:
        server = GatewayServer(gateway.app, GatewayOptions(port=0), gateway.drain)
        _, port = await server.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            await server.aclose()
    await images.aclose()


def test_the_report_tells_both_kinds_alone_and_together_and_what_a_cancel_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "PUSH_S", 0.05)
    file = tmp_path / "rows.jsonl"

    async def scenario():
        async with both(monkeypatch) as url:
            models = ["--chat-model", "tiny", "--image-model", "painter", "--output-len", "8"]
            timing = ["--seconds", "0.4", "--warm-up", "0.1", "-r", "2", "--cancels", "2", "--cancel-steps", "50"]
            await together.main([url, *models, *timing, "--steps", "4", "-o", str(file)])

    asyncio.run(asyncio.wait_for(scenario(), 60))
    rows = {row["workload"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == ["chat alone", "images alone", "together", "cancel"]
    assert "image_step_ms" not in rows["chat alone"] and "chat_itl_ms" not in rows["images alone"]
    for name in ("chat alone", "together"):
        assert set(rows[name]["chat_itl_ms"]) == {"p50", "p90", "p99"} and rows[name]["chat_chunks_s"] > 0
    for name in ("images alone", "together"):
        assert rows[name]["image_step_ms"]["p50"] > 0 and rows[name]["images_s"] > 0
    cancelled = rows["cancel"]
    assert cancelled["cancels"] == len(cancelled["steps_past_seen"]) == 2 and cancelled["still_running"] == 0
    assert all(0 <= steps <= 48 for steps in cancelled["steps_past_seen"])


def test_a_failing_stream_ends_the_measurement():
    async def scenario():
        args = together._parser().parse_args(["http://127.0.0.1:9", "--output-len", "8"])
        async with answering(b'data: {"error": {"message": "the replica was lost"}}\n\n') as (server, _):
            for stream in (together.chat_stream, together.image_stream):
                tally = together.Tally()
                with pytest.raises(RuntimeError, match="the replica was lost"):
                    await together.run([lambda tally, stream=stream: stream(server, args, tally)], tally, 5)

    asyncio.run(asyncio.wait_for(scenario(), 20))
