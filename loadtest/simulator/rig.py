"""What is measured to calibrate against: real gateway processes, hub and channel, replicas, and clients over HTTP.

    this process: hub, clients ══HTTP══ gateway processes ══channel══ one process with all replicas

Replicas are paced (`loadtest/paced.py`) or real. Two cores are enough for all of it as long as the devices are slept.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil

from loadtest.paced import TextDevice
from loadtest.simulator.rig_replicas import Plan
from loadtest.simulator.samples import StepSample
from loadtest.simulator.visit import Visit
from serve import wire
from serve.hub import Hub
from serve.local import _BOOT, _ROOT
from serve.options import GatewayOptions
from serve.process import Spec

START_S = 60.0
STOP_S = 10.0


@dataclass(slots=True)
class Rig:
    """Running. `samples` is there when it has stopped, a list for each replica."""

    urls: list[str]
    gateways: list[psutil.Process]
    hub: Hub
    samples: list[list[StepSample]] = field(default_factory=list)

    def snapshot(self, process: str) -> wire.Push:
        """What that process has pushed last."""
        return wire.Push(self.hub._lives[process].snapshot)

    def gateway_cpu_s(self) -> float:
        """Of all gateway processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.gateways)

    async def ask(self, visits: Sequence[Visit]) -> None:
        """Send each at its time, counted from now, and note what came back when. Raises what the first failed with."""
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, visit in enumerate(visits):
                await asyncio.sleep(max(0.0, began + visit.arrived_s - time.perf_counter()))
                group.create_task(_ask(self.urls[number % len(self.urls)], visit, began))


@asynccontextmanager
async def rig(
    *, num_replicas: int, num_gateways: int = 1, device: TextDevice | None = None, model: str = "tandem-text"
) -> AsyncIterator[Rig]:
    """Everything started and met; stopped at the end."""
    directory = Path(tempfile.mkdtemp(prefix="rig-"))
    secret = secrets.token_bytes(32)
    hub = Hub(secret)
    children: list[Process] = []
    try:
        hub_address = await hub.start(f"unix:{directory}/hub")
        plan = Plan(
            secret=secret.hex(), hub_address=hub_address, directory=str(directory), num_replicas=num_replicas,
            model=model, device=device, samples=str(directory / "samples.json"),
        )  # fmt: skip
        replicas = await _child([sys.executable, "-m", "loadtest.simulator.rig_replicas"], plan)
        children.append(replicas)
        for number in range(num_gateways):
            spec = Spec(
                process_id=f"gateway-{number}",
                secret=base64.b64encode(secret).decode(),
                hub_address=hub_address,
                address="",
                directory=str(directory / "unused"),
                gateway=GatewayOptions(port=0),
                models=("rig",),
            )
            children.append(await _child([sys.executable, "-P", "-c", _BOOT.format(root=str(_ROOT))], spec))
        await _line(replicas, b"ready")
        urls = [json.loads(await _line(child, b'"ready"'))["url"] for child in children[1:]]
        for child in children[1:]:
            await _line(child, b'"met"')
        made = Rig(urls, [psutil.Process(child.pid) for child in children[1:]], hub)
        yield made
        await _stop(replicas)
        found = json.loads((directory / "samples.json").read_text())
        made.samples = [[StepSample(**sample) for sample in samples] for samples in found]
    finally:
        for child in reversed(children):
            await _stop(child)
        await hub.aclose()
        shutil.rmtree(directory, ignore_errors=True)


async def _child(command: list[str], told: Plan | Spec) -> Process:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(told) + b"\n")
    return process


async def _line(process: Process, wanted: bytes) -> bytes:
    """The next line of its output that has `wanted` in it."""
    assert process.stdout is not None
    async with asyncio.timeout(START_S):
        while line := await process.stdout.readline():
            if wanted in line:
                return line
    raise RuntimeError(f"a process of the rig ended before it was {wanted.decode()}; its log is above")


async def _stop(process: Process) -> None:
    """Closing its input ends a child."""
    if process.returncode is None:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _ask(url: str, visit: Visit, began: float) -> None:
    body = {
        "model": "rig",
        "prompt": list(visit.request.prompt_token_ids),
        "max_tokens": visit.num_output,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    visit.arrived_s = sent - began  # its own lateness is not the server's
    async with aclosing(_events(url, json.dumps(body).encode())) as events:
        async for now, event in events:
            if "error" in event:
                raise RuntimeError(f"the rig's gateway said {event['error']}")
            if any(choice.get("text") for choice in event["choices"]):
                visit.first(now - began)
            if usage := event.get("usage"):
                assert usage["completion_tokens"] == visit.num_output, usage
                visit.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                visit.end(now - began)


async def _events(url: str, body: bytes) -> AsyncGenerator[tuple[float, dict[str, Any]]]:
    """The answer's events, and when each was read. A connection of its own: nothing is shared between requests."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                yield time.perf_counter(), json.loads(line[6:])
            elif line.startswith(b'{"error"'):
                raise RuntimeError(f"the rig's gateway said {line.decode()}")
    finally:
        writer.close()
