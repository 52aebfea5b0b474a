"""A child process of the local application: one replica or one gateway.

The parent writes a `Spec` as one JSON line to the child's standard input and keeps it open: when it closes, the parent
is gone and the child ends at once. The child answers with JSON lines on standard output: `ready` or `failed`, and a
gateway `met` once it can serve every model. SIGTERM drains. Everything else (logs, progress bars) goes to standard
error.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec

from serve.devices import VISIBLE
from serve.errors import TandemError
from serve.logs import configure_logging
from serve.options import GatewayOptions, ModelOptions
from serve.request import ModelCard

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What a child is told: exactly one of `model` and `gateway` is given."""

    process_id: str
    secret: str
    """Base64. Passed here, never on a command line or in the environment."""
    hub_address: str
    address: str
    """Where a replica listens."""
    directory: str
    """Of the application's sockets. Removed when the parent has gone without doing so."""
    model: ModelOptions | None = None
    devices: tuple[str, ...] = ()
    """Of a replica, by CUDA's names; empty: those this process sees."""
    num_replicas_here: int = 1
    """Replicas that share this machine's cores and memory."""
    gateway: GatewayOptions | None = None
    models: tuple[str, ...] = ()
    """What a gateway is to meet."""
    drain_timeout_s: float = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a child says: `event` is "ready", "met" or "failed"."""

    event: str
    url: str = ""
    card: ModelCard | None = None
    code: str = ""
    message: str = ""


class _Part(Protocol):
    async def drain(self, timeout_s: float) -> None: ...
    async def aclose(self) -> None: ...


def main() -> None:
    """Run what standard input asks for, until SIGTERM or the parent's end."""
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=Spec)
    configure_logging()
    if spec.devices:  # before anything loads CUDA
        os.environ[VISIBLE] = ",".join(spec.devices)
    threading.Thread(target=_end_with_parent, args=(spec.directory,), name="parent-watch", daemon=True).start()
    try:
        asyncio.run(_run(spec))
    except TandemError as error:
        _report(Report(event="failed", code=error.code, message=error.message))
        raise SystemExit(1) from None
    except Exception as error:
        log.exception("process failed id=%s", spec.process_id)
        _report(Report(event="failed", code="internal_error", message=f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None


async def _run(spec: Spec) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    background: set[asyncio.Task[None]] = set()
    starting = asyncio.create_task(_start(spec, background))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        os._exit(0)  # told to stop while loading: nothing was accepted, nothing is lost
    part = starting.result()
    await stopping
    for task in background:
        task.cancel()
    await part.drain(spec.drain_timeout_s)
    await part.aclose()


async def _start(spec: Spec, background: set[asyncio.Task[None]]) -> _Part:
    secret = base64.b64decode(spec.secret)
    if spec.model is not None:
        from serve.ranks.launch import LocalLauncher
        from serve.replica import Replica, build

        replica = Replica(
            spec.model,
            replica_id=spec.process_id,
            secret=secret,
            hub_address=spec.hub_address,
            address=spec.address,
            build=partial(build, num_replicas_here=spec.num_replicas_here, launcher=LocalLauncher(spec.directory)),
        )
        await replica.start()
        _report(Report(event="ready", card=replica.card))
        return replica
    assert spec.gateway is not None
    from serve.gateway.gateway import Gateway

    gateway = Gateway(
        spec.gateway,
        gateway_id=spec.process_id,
        secret=secret,
        hub_address=spec.hub_address,
        models=spec.models,
    )
    _report(Report(event="ready", url=await gateway.start()))

    async def meet() -> None:
        await gateway.meet(spec.models)
        _report(Report(event="met"))

    background.add(asyncio.create_task(meet()))
    return gateway


def _report(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_parent(directory: str) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # unbuffered: a buffered read holds a lock that the exit needs
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # with the processes it started, those too that hang
