"""What HTTP clients cost and how late they read: `python -m loadtest.client_cost [--streams 64] [--chunks 200]`.

A server of its own process streams events that hold the time they were written at, so many streams at once, a chunk of
each every 20 ms. Each client reads them all in turn: its CPU per chunk, and the time from written to read. Those that
are not installed are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

from loadtest.client import EventReader, Server
from loadtest.report import Report

PERIOD_S = 0.02
Read = Callable[[str, int, list[float]], Awaitable[None]]
"""(address, streams, delays): reads so many streams at once and adds the delay of every chunk."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.client_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=200, help="of a stream")
    parser.add_argument("--serve", action="store_true", help="be the server")
    args = parser.parse_args(arguments)
    if args.serve:
        asyncio.run(_serve(args.chunks))
        return
    report = Report(None)
    command = [sys.executable, "-m", "loadtest.client_cost", "--serve", "--chunks", str(args.chunks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{int(server.stdout.readline())}"
        for name, read in (("this client", _ours), ("aiohttp", _aiohttp), ("httpx", _httpx)):
            delays: list[float] = []
            began = time.process_time()
            try:
                _run(read(address, args.streams, delays))
            except ImportError:
                continue
            cpu_s, ranked = time.process_time() - began, sorted(delays)
            report(
                client=name,
                chunks=len(delays),
                cpu_us_per_chunk=1e6 * cpu_s / len(delays),
                delay_p50_ms=1e3 * statistics.median(ranked),
                delay_p99_ms=1e3 * ranked[len(ranked) * 99 // 100],
            )
        server.terminate()


async def _ours(address: str, streams: int, delays: list[float]) -> None:
    server = Server.at(address)

    async def stream() -> None:
        reader = EventReader(lambda now, data: delays.append(now - json.loads(data)["at"]))
        await server.post("/", b"{}", reader.feed)

    await asyncio.gather(*(stream() for _ in range(streams)))


async def _aiohttp(address: str, streams: int, delays: list[float]) -> None:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def stream() -> None:
            async with session.post(address, data=b"{}") as answer:
                async for piece in answer.content.iter_any():
                    _read(piece, delays)

        await asyncio.gather(*(stream() for _ in range(streams)))


async def _httpx(address: str, streams: int, delays: list[float]) -> None:
    import httpx

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as session:

        async def stream() -> None:
            async with session.stream("POST", address, content=b"{}") as answer:
                async for piece in answer.aiter_raw():
                    _read(piece, delays)

        await asyncio.gather(*(stream() for _ in range(streams)))


def _read(piece: bytes, delays: list[float]) -> None:
    """Events are smaller than what is read at once, so none is cut."""
    now = time.perf_counter()
    delays += [now - json.loads(line[6:])["at"] for line in piece.split(b"\n") if line.startswith(b"data: ")]


async def _serve(num_chunks: int) -> None:
    """Prints its port. A chunk is about as large as a token's event of a chat."""
    filling = "x" * 250

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for _ in range(num_chunks):
            await asyncio.sleep(PERIOD_S)
            event = b"data: " + json.dumps({"at": time.perf_counter(), "x": filling}).encode() + b"\n\n"
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _run(reading: Awaitable[None]) -> None:
    async def scenario() -> None:
        await reading

    try:
        import uvloop
    except ImportError:
        asyncio.run(scenario())
    else:
        uvloop.run(scenario())


if __name__ == "__main__":
    main()
