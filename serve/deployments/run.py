"""`tandem serve` on Ray: start a local Ray or join a cluster, run the application, and leave nothing behind.

An embedded Ray belongs to this command alone: it joins no cluster it was not told to and ends with it. Our own sockets
are on loopback then; Ray's cannot be kept there. On a cluster that was joined only our application is deleted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import re
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from serve.deployments.reaper import watch_over
from serve.errors import ConfigError, TandemError
from serve.gateway.auth import LOOPBACK_NAMES
from serve.options import ServeOptions
from serve.preflight import settle
from serve.replica import Served, build
from serve.request import ModelCard

log = logging.getLogger(__name__)

APPLICATION = "tandem"
MEETING_S = 30.0
"""For a gateway to connect to replicas that are up already."""
_ROOT = Path(__file__).resolve().parent.parent.parent
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it aborts on the SIGTERM that asks us to drain
    "RAY_worker_niceness": "0",  # by default gateways and replicas are nice (15) to all else, clients too
    "RAY_enable_metrics_collection": "0",  # Ray's own: nobody reads an embedded one's, and they cost 6 % of the CPU
}
"""Set before Ray is imported; what the user has set stays."""


class RayApplication:
    """An `Application` on Ray Serve."""

    def __init__(
        self, options: ServeOptions, *, ray_address: str | None = None, build: Callable[..., Served] = build
    ) -> None:
        """`build`: loads a replica's model."""
        self._options = options
        self._build = build
        self._ray_address = ray_address
        self._cards: list[ModelCard] = []
        self._gateways: Any = None
        """Handle of their deployment, once it is started."""
        self._reaper: subprocess.Popen[bytes] | None = None

    async def start(self) -> str:
        """In a thread that nobody waits for: a start that is interrupted hangs in Ray's client."""
        return await _in_lasting_thread(self._start)

    def cards(self) -> list[ModelCard]:
        return self._cards

    async def failed(self) -> str:
        """Poll Serve's view: deployments are restarted by Serve; only a lost cluster ends the application."""
        from ray import serve as ray_serve

        while True:
            await asyncio.sleep(5.0)
            try:
                status = await asyncio.to_thread(ray_serve.status)
            except Exception as error:
                return f"the Ray cluster does not answer: {type(error).__name__}"
            if APPLICATION not in status.applications:
                return f"application {APPLICATION!r} was deleted from the Ray cluster"

    async def drain(self, timeout_s: float) -> None:
        await asyncio.to_thread(self._drain, timeout_s)

    def kill(self) -> None:
        """Ray's processes end with this one (see `reaper.py`); an application on a joined cluster is deleted first."""
        import ray
        from ray import serve as ray_serve

        if self._ray_address is None and self._reaper is None:  # it is ended while it starts
            self._reaper = watch_over(psutil.Process().children(recursive=True))
        if ray.is_initialized():
            if self._ray_address is not None:
                with contextlib.suppress(Exception):
                    ray_serve.delete(APPLICATION, _blocking=False)
            ray.shutdown()

    def _start(self) -> str:
        # Keys are read here: the gateway's node on a cluster has neither this machine's files nor this environment.
        options = settle(self._options, loads_here=self._ray_address is None)
        if self._ray_address is None:
            options = _with_port(options)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if self._ray_address is None and "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray
        from ray import serve as ray_serve

        from serve.deployments.app import build_application
        from serve.deployments.node import num_nodes

        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it misses the main thread; we handle signals
        with _in_directory(_ROOT):  # Ray puts the driver's working directory first on its workers' path
            if self._ray_address is None:
                ray.init(
                    address="local",
                    num_cpus=max(2, os.cpu_count() or 1),
                    include_dashboard=False,
                    namespace=APPLICATION,
                    logging_level=logging.WARNING,
                )
                self._reaper = watch_over(psutil.Process().children(recursive=True))
            else:
                try:
                    ray.init(address=self._ray_address, namespace=APPLICATION, logging_level=logging.WARNING)
                except (ConnectionError, ValueError) as error:
                    raise ConfigError(
                        f"--ray-address {self._ray_address!r} cannot be joined: {error}; is it up? A cluster that "
                        f"asks for a token needs RAY_AUTH_MODE=token here"
                    ) from None
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        if self._ray_address is None:
            ray_serve.start(proxy_location="Disabled", logging_config=quiet)
        elif APPLICATION in ray_serve.status().applications:
            raise ConfigError(
                f"the Ray cluster at {self._ray_address!r} already runs an application named {APPLICATION!r}; delete "
                f"it with `serve delete {APPLICATION}` or use another cluster"
            )
        try:
            handle = self._gateways = ray_serve.run(
                build_application(
                    options,
                    host="127.0.0.1" if self._ray_address is None else None,
                    max_failed_starts=1,
                    build=self._build,
                ),
                name=APPLICATION,
                route_prefix="/tandem",
                logging_config=quiet,
            )
        except RuntimeError as error:
            raise _deploy_error(ray_serve, error) from None
        # Serve calls deployments ready on their own; what counts is that the gateway has met every model.
        try:
            names = [model.name for model in options.models]
            self._cards = handle.meet.remote(names).result(timeout_s=MEETING_S)  # now it knows all that it reaches
            handle.broadcast("meet", names).results(timeout_s=MEETING_S)
        except TimeoutError:
            raise TandemError(f"start-up failed: a gateway did not reach every model in {MEETING_S:g} s") from None
        urls = sorted(set(handle.broadcast("url").results(timeout_s=MEETING_S)))
        log.info("gateways ready urls=%s", ",".join(urls))
        if num_nodes() > 1 and options.gateway.host in LOOPBACK_NAMES:
            log.warning(
                "host is %r: a gateway answers on its own node only; give --host 0.0.0.0 and keys", options.gateway.host
            )
        return str(urls[0])

    def _drain(self, timeout_s: float) -> None:
        import ray
        from ray import serve as ray_serve

        with contextlib.suppress(Exception):  # a gateway that died has nothing left to drain
            self._gateways.broadcast("drain", timeout_s).results(timeout_s=timeout_s + 5.0)
        ray_serve.delete(APPLICATION)
        ray.shutdown()


def _with_port(options: ServeOptions) -> ServeOptions:
    """A free port where any was asked for: one that gateways share, and keep when they are started again."""
    gateway = options.gateway
    if gateway.port:
        return options
    family, _, _, _, (host, *_) = socket.getaddrinfo(gateway.host, 0, type=socket.SOCK_STREAM)[0]
    with socket.create_server((str(host), 0), family=family) as free:
        port = free.getsockname()[1]
    return dataclasses.replace(options, gateway=dataclasses.replace(gateway, port=port))


def _in_lasting_thread(call: Callable[[], str]) -> asyncio.Future[str]:
    """What `call` returns or raises, once it does, from a daemon thread that stays when it is done.

    A daemon, so that it does not keep a process alive that is told to end meanwhile. It stays, because the kernel kills
    Ray's processes with the thread that started them (PR_SET_PDEATHSIG).
    """
    outcome: concurrent.futures.Future[str] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=run, name="ray", daemon=True).start()
    return asyncio.wrap_future(outcome)


def _deploy_error(ray_serve: Any, error: RuntimeError) -> TandemError:
    """What the failing deployment said, instead of Serve's summary."""
    said = str(error)
    with contextlib.suppress(Exception):
        status = ray_serve.status().applications[APPLICATION]
        said = "\n".join(deployment.message for deployment in status.deployments.values()) or said
    own = own_error(said)
    return ConfigError(own) if own is not None else TandemError(f"start-up failed: {said}")


def own_error(said: str) -> str | None:
    """The message of our own error in what Serve reports of a deployment: the text of a traceback, or of several."""
    found = re.findall(r"^serve\.errors\.\w+: (.+)$", said, re.MULTILINE)
    return found[-1] if found else None


@contextlib.contextmanager
def _in_directory(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
