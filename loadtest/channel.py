"""What the channel costs: steps of small events from a replica's process to a gateway's, as fast as they go.

    python -m loadtest.channel [--streams 32] [--steps 5000] [--loop asyncio|uvloop] [--address unix|tcp]

Prints events/s, and for both sides the CPU time per event and per step. The replica's side matters most: its event loop
shares an interpreter with the engine's thread, so a microsecond here is a microsecond between two steps there. Figures
include what the source itself does: one new event object and one wake-up a stream and step.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from typing import Any

from serve.backend import EventStream, Load
from serve.channel import ChannelClient
from serve.channel_server import ChannelServer
from serve.events import Event, Finished, FinishReason, TokenDelta, Usage
from serve.request import ModelCard, Request, SamplingParams, TextRequest


class _Stream:
    """Events of one request, as the engine's stream hands them over: one wake-up of the loop for all streams."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.waiter: asyncio.Future[None] | None = None
        self.is_ended = False

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> list[Event]:
        while not self.events:
            if self.is_ended:
                raise StopAsyncIteration
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        events, self.events = self.events, []
        return events

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def aclose(self) -> None: ...


class _Source:
    """A backend that steps as soon as all its streams are open and read: one token per stream and step."""

    def __init__(self, num_streams: int):
        self.card = ModelCard(
            name="source", kind="text", source="", device="cpu", dtype="float32", num_parameters=0,
            max_model_len=1 << 20, kv_cache_tokens=0, vocab_size=1 << 17, threads=1, load_s=0.0,
        )  # fmt: skip
        self._num_streams = num_streams
        self._streams: list[_Stream] = []
        self._stepping: asyncio.Task[None] | None = None

    async def submit(self, request: Request) -> EventStream:
        self._streams.append(stream := _Stream())
        if len(self._streams) == self._num_streams:
            self._stepping = asyncio.create_task(self._run(request.sampling.max_tokens))
        return stream

    async def _run(self, num_steps: int) -> None:
        await asyncio.sleep(0.1)
        streams, began = self._streams, time.process_time()
        for step in range(num_steps):
            for stream in streams:
                stream.events.append(TokenDelta(0, (step,)))
                stream.wake()
            while any(stream.events for stream in streams):
                await asyncio.sleep(0)
        cpu_s = time.process_time() - began
        for stream in streams:
            # The figure travels as the usage: microseconds of CPU time of the whole run.
            stream.events.append(Finished(0, FinishReason.LENGTH, Usage(completion_tokens=int(cpu_s * 1e6))))
            stream.is_ended = True
            stream.wake()

    def load(self) -> Load:
        return Load(running=self._num_streams)

    async def check_health(self) -> None: ...
    async def drain(self, timeout_s: float) -> None: ...
    async def aclose(self) -> None: ...


async def _serve(address: str, num_streams: int) -> None:
    secret = bytes.fromhex(sys.stdin.readline())
    server = ChannelServer(_Source(num_streams), {}, secret=secret, replica_id="source")
    print(await server.start(address), flush=True)
    await asyncio.Event().wait()


async def _measure(address: str, secret: bytes, num_streams: int, num_steps: int) -> None:
    client = await ChannelClient.connect(address, secret=secret, gateway_id="loadtest")
    sampling = SamplingParams(max_tokens=num_steps)
    opening = [
        client.submit(TextRequest(request_id=str(n), model="source", prompt_token_ids=(1,), sampling=sampling))
        for n in range(num_streams)
    ]
    streams = await asyncio.gather(*opening)
    began, cpu_began = time.perf_counter(), time.process_time()
    server_cpu_us = (await asyncio.gather(*(_read(stream) for stream in streams)))[0]
    wall_s, cpu_s = time.perf_counter() - began - 0.1, time.process_time() - cpu_began
    num_events = num_streams * num_steps
    print(
        f"streams={num_streams} steps={num_steps} events_per_s={num_events / wall_s:,.0f} "
        f"server_us_per_event={server_cpu_us / num_events:.2f} server_us_per_step={server_cpu_us / num_steps:.1f} "
        f"client_us_per_event={cpu_s / num_events * 1e6:.2f} client_us_per_step={cpu_s / num_steps * 1e6:.1f}"
    )
    await client.aclose()


async def _read(stream: EventStream) -> int:
    """Read to the end; the server's CPU time in µs."""
    last: Event | None = None
    async for events in stream:
        last = events[-1]
    assert isinstance(last, Finished)
    return last.usage.completion_tokens


def _run(loop: str, main: Coroutine[Any, Any, None]) -> None:
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--address", choices=("unix", "tcp"), default="unix")
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        _run(arguments.loop, _serve(arguments.serve, arguments.streams))
        return
    secret = secrets.token_bytes(32)
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/channel" if arguments.address == "unix" else "tcp:127.0.0.1:0"
        command = [sys.executable, "-m", "loadtest.channel", "--serve", address, "--loop", arguments.loop]
        command += ["--streams", str(arguments.streams)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(secret.hex() + "\n")
            server.stdin.flush()
            actual = server.stdout.readline().strip()
            try:
                _run(arguments.loop, _measure(actual, secret, arguments.streams, arguments.steps))
            finally:
                server.kill()


if __name__ == "__main__":
    main()
