"""One application as processes of this machine, without Ray: the same replicas and gateways, and the same channel.

    this process: hub + supervisor ──stdin/stdout── replica 0 … N      (one engine each)
                                   ──stdin/stdout── gateway 0 … M      (one HTTP server each)
                                          replica ══ unix socket ══ gateway

A child that dies is started again, with a growing pause while it keeps dying; one that cannot even start the first time
ends the application with its reason. Children are sessions of their own, so a terminal's Ctrl-C reaches only this
process, which then drains them in order: gateways first, replicas after.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import msgspec

from serve.devices import assign_devices, visible_devices
from serve.errors import ConfigError, EngineDead, TandemError, by_code
from serve.hub import Hub
from serve.options import ModelOptions, ServeOptions
from serve.preflight import settle
from serve.process import Report, Spec
from serve.request import ModelCard

log = logging.getLogger(__name__)

RESTART_PAUSE_S = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
"""Pause before the n-th restart in a row; a child that lived `STABLE_S` starts the row anew."""
STABLE_S = 60.0
MEETING_S = 30.0
"""For every gateway to connect to replicas that are up already, and to read their tokenizers."""
REAPING_S = 2.0
"""For killed children to be gone, after a start that failed."""
EXIT_MARGIN_S = 5.0
"""How much longer than the drain time a child gets before it is killed."""

_ROOT = Path(__file__).resolve().parent.parent
_BOOT = "import sys; sys.path.insert(0, {root!r}); from serve.process import main; main()"


class _Child:
    """One child process and the task that keeps it alive."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.process: Process | None = None
        self.started: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self.met = asyncio.Event()
        self.report: Report | None = None
        self.is_stopping = False

    async def supervise(self) -> None:
        """Run the process, again and again, until it is told to stop or cannot start the first time."""
        loop, failures = asyncio.get_running_loop(), 0
        while not self.is_stopping:
            born = loop.time()
            report = await self._run_once()
            if self.is_stopping:
                return
            if not self.started.done():
                self.started.set_result(report)
                return
            failures = 1 if loop.time() - born > STABLE_S else failures + 1
            pause = RESTART_PAUSE_S[min(failures, len(RESTART_PAUSE_S)) - 1]
            log.error("process ended id=%s restart_in_s=%s reason=%r", self.spec.process_id, pause, report.message)
            await asyncio.sleep(pause)

    async def _run_once(self) -> Report:
        """Start the process, pass on its first report, return when it has ended."""
        # -P and the explicit root: a child imports the files this process runs, whatever lies in the working directory.
        boot = _BOOT.format(root=str(_ROOT))
        self.process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", boot, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        assert process.stdin is not None and process.stdout is not None
        if self.is_stopping:  # told so while the process was made
            self.kill()
        process.stdin.write(msgspec.json.encode(self.spec) + b"\n")
        last = Report(
            event="failed", code=EngineDead.code, message="the process ended without a word; see its log above"
        )
        with contextlib.suppress(ConnectionError):
            await process.stdin.drain()
        while line := await process.stdout.readline():
            last = msgspec.json.decode(line, type=Report)
            if last.event == "ready":
                self.report = last
                log.info("process ready id=%s pid=%s", self.spec.process_id, process.pid)
                if not self.started.done():
                    self.started.set_result(last)
            elif last.event == "met":
                self.met.set()
        code = await process.wait()
        _kill_group(process)
        return last if last.event == "failed" else dataclasses.replace(last, message=f"exit status {code}")

    async def stop(self, timeout_s: float) -> None:
        """Ask the process to drain and end; kill it when it does not."""
        self.is_stopping = True
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            log.error("process killed id=%s after_s=%s", self.spec.process_id, timeout_s)
        _kill_group(self.process)

    def kill(self) -> None:
        self.is_stopping = True
        if self.process is not None and self.process.returncode is None:
            _kill_group(self.process)


def _kill_group(process: Process) -> None:
    """Kill what lives of `process` and what it started: ranks that hang do not see that it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class LocalApplication:
    """An `Application` of child processes. See the module's drawing."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._directory = Path(tempfile.mkdtemp(prefix="tandem-"))  # 0700; also bounds the socket paths' length
        self._secret = secrets.token_bytes(32)
        self._hub = Hub(self._secret)
        self._replicas: list[_Child] = []
        self._gateways: list[_Child] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        try:
            return await self._start()
        except BaseException:
            # asyncio complains of children that are still there when its loop ends.
            self.kill()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=REAPING_S)
            raise

    async def _start(self) -> str:
        self._options = settle(self._options, loads_here=True)
        hub_address = await self._hub.start(f"unix:{self._directory}/hub")
        assigned = assign_devices(self._options.models, visible_devices())
        for index, (model, replicas) in enumerate(zip(self._options.models, assigned, strict=True)):
            for number, devices in enumerate(replicas):
                name = f"replica-{index}-{number}"
                self._replicas.append(self._child(name, hub_address, model=model, devices=devices))
        # Gateways start beside the replicas: they import while weights load, and are ready when the models are.
        first = self._child("gateway-0", hub_address)
        self._gateways.append(first)
        url = (await self._first_report(first)).url
        port = int(url.rsplit(":", 1)[1])
        first.spec = self._spec("gateway-0", hub_address, port=port)  # a restart takes the same port, also for port 0
        for number in range(1, self._options.gateway.num_gateways):
            self._gateways.append(self._child(f"gateway-{number}", hub_address, port=port))
        for child in [*self._replicas, *self._gateways]:
            await self._first_report(child)
        try:
            async with asyncio.timeout(MEETING_S):
                await asyncio.gather(*(gateway.met.wait() for gateway in self._gateways))
        except TimeoutError:
            raise TandemError(f"start-up failed: a gateway did not reach every model in {MEETING_S:g} s") from None
        return url

    def cards(self) -> list[ModelCard]:
        cards: dict[str, ModelCard] = {}
        for child in self._replicas:
            if child.report is not None and child.report.card is not None:
                cards.setdefault(child.report.card.name, child.report.card)
        return list(cards.values())

    async def failed(self) -> str:
        """Children are restarted for ever, so this returns only when a supervising task itself ends."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        return "a supervised process could not be restarted; see the log above"

    async def drain(self, timeout_s: float) -> None:
        for children in (self._gateways, self._replicas):
            await asyncio.gather(*(child.stop(timeout_s + EXIT_MARGIN_S) for child in children))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._hub.aclose()
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        for child in [*self._gateways, *self._replicas]:
            child.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _child(self, name: str, hub_address: str, **part: Any) -> _Child:
        child = _Child(self._spec(name, hub_address, **part))
        self._tasks.append(asyncio.create_task(child.supervise(), name=name))
        return child

    def _spec(
        self,
        name: str,
        hub_address: str,
        *,
        model: ModelOptions | None = None,
        devices: tuple[str, ...] = (),
        port: int | None = None,
    ) -> Spec:
        gateway = self._options.gateway
        return Spec(
            process_id=name,
            secret=base64.b64encode(self._secret).decode(),
            hub_address=hub_address,
            address=f"unix:{self._directory}/{name}",
            directory=str(self._directory),
            model=model,
            devices=devices,
            num_replicas_here=sum(model.num_replicas for model in self._options.models),
            models=tuple(model.name for model in self._options.models),
            gateway=None if model else dataclasses.replace(gateway, port=gateway.port if port is None else port),
            drain_timeout_s=gateway.drain_timeout_s,
        )

    async def _first_report(self, child: _Child) -> Report:
        """Wait for a child's first report, or for the failure of any other child. Raises what it failed with."""
        waiting = {other.started for other in [*self._replicas, *self._gateways] if not other.started.done()}
        while not child.started.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                _raise_failure(future.result())
        report = child.started.result()
        _raise_failure(report)
        return report


def _raise_failure(report: Report) -> None:
    if report.event == "failed":
        error = by_code(report.code, report.message)
        raise error if isinstance(error, ConfigError) else TandemError(f"start-up failed: {report.message}")
