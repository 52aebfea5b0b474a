"""One gateway: pool, application, server and its place at the hub. A child process or a Ray Serve replica holds one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Collection
from functools import partial
from typing import cast

from serve.channel import Attend, ChannelClient
from serve.errors import EngineDead
from serve.gateway.app import build_app
from serve.gateway.auth import LOOPBACK_NAMES, Keys, check_exposure
from serve.gateway.drain import Drain
from serve.gateway.hold import Hold, Sleeper, Wake
from serve.gateway.pool import Pool, Remote
from serve.gateway.routing import Router
from serve.gateway.server import GatewayServer
from serve.gateway.telemetry import Telemetry
from serve.gateway.tracing import GatewayTracing, TracedReplica
from serve.hub_client import Address, HubClient
from serve.options import GatewayOptions
from serve.recorder import Recorder
from serve.request import ModelCard
from serve.tracing import start_tracing
from serve.wire import ReplicaEntry


class Gateway:
    """Start, drain, close. `attend_for` makes the call that tells others of this gateway's work at a replica."""

    def __init__(
        self,
        options: GatewayOptions,
        *,
        gateway_id: str,
        secret: bytes,
        hub_address: Address,
        attend_for: Callable[[ReplicaEntry], Attend | None] = lambda entry: None,
        shares_port: bool | None = None,
        models: Collection[str] = (),
        sleepers: Collection[Sleeper] = (),
        wake: Wake | None = None,
    ) -> None:
        """`shares_port`: of `GatewayServer`. `models`: all that are configured. `sleepers`: those that may have no
        replica; `wake` asks for one."""
        self._options = options
        self._gateway_id = gateway_id
        self._secret = secret
        self._hub_address = hub_address
        self._attend_for = attend_for
        self._shares_port = shares_port
        self._recorder = Recorder(gateway_id, "gateway")
        tracing = start_tracing(gateway_id)
        self._tracing = None if tracing is None else GatewayTracing(tracing)
        self._hold = Hold(sleepers, wake, timeout_s=options.wake_timeout_s)
        for model in self._hold.models:
            self._recorder.admit(model)
            self._recorder.follow("tandem_requests_held", partial(self._hold.num_held, model), model=model)
        self._pool = Pool(
            self._connect,
            Router(seed=gateway_id),
            recorder=self._recorder,
            hold=self._hold,
            max_wait_s=options.max_wait_s,
            configured=models,
        )
        self._drain = Drain()
        self._hub: HubClient | None = None
        self._server: GatewayServer | None = None

    async def start(self, *, meet: Collection[str] = (), within_s: float = 0.0) -> str:
        """Follow the hub and listen; the URL. Models join as their replicas do. Raises ConfigError.

        `meet`: models to wait for before it listens, `within_s` at most: one that follows another at a port takes no
        request before it can serve it.
        """
        keys = Keys.load(self._options)
        check_exposure(self._options, keys)
        hub = self._hub = await HubClient.connect(
            self._hub_address, secret=self._secret, process=self._gateway_id, recorder=self._recorder
        )
        hub.watch(self._pool.update)
        if within_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pool.meet(meet), within_s)
        app = build_app(
            self._pool,
            self._options,
            self._recorder,
            hub.render,
            keys=keys,
            drain=self._drain,
            tracing=self._tracing,
        )
        self._server = GatewayServer(
            app,
            self._options,
            self._drain,
            refused_connection=Telemetry(self._recorder).refused_connection,
            shares_port=self._shares_port,
        )
        host, port = await self._server.start()
        # What is loaded now stays: without this each collection walks all modules (1.6 ms a request instead of 0.6
        # with transformers loaded, measured over 200 requests on a fake backend).
        gc.collect()
        gc.freeze()
        return _url(self._options.host, host, port)

    def cards(self) -> list[ModelCard]:
        """The models this gateway has met."""
        return self._pool.models.cards()

    async def meet(self, models: Collection[str]) -> None:
        """Return when every one of `models` can be served from here."""
        await self._pool.meet(models)

    def retire(self, replica_ids: Collection[str]) -> None:
        """These replicas are about to end: they get nothing new from here."""
        self._pool.retire(replica_ids)

    def check_health(self) -> None:
        """Raise when this process should be replaced."""
        if self._server is None or not self._server.is_listening:
            raise EngineDead("the gateway's server has stopped")

    async def drain(self, timeout_s: float) -> None:
        """Readiness false at once, new work refused; what still runs after `timeout_s` ends with an error."""
        if self._server is not None:
            await self._server.drain(timeout_s)

    async def hand_over(self, timeout_s: float) -> None:
        """End without anybody noticing, where another gateway listens at the same port."""
        if self._server is not None:
            await self._server.hand_over(timeout_s)

    async def aclose(self) -> None:
        """Close sockets and connections; what still runs is cancelled."""
        gc.unfreeze()
        if self._server is not None:
            await self._server.aclose()
        self._hold.close()
        await self._pool.aclose()
        if self._hub is not None:
            await self._hub.aclose()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def _connect(self, entry: ReplicaEntry, on_lost: Callable[[], None]) -> Remote:
        remote: Remote = await ChannelClient.connect(
            entry.address,
            secret=self._secret,
            gateway_id=self._gateway_id,
            on_lost=on_lost,
            attend=self._attend_for(entry),
        )
        if self._tracing is not None:
            remote = cast(Remote, TracedReplica(remote, self._tracing, entry.replica_id))
        return remote


def _url(asked: str, host: str, port: int) -> str:
    """An address to call: loopback for a socket on all interfaces."""
    if asked in LOOPBACK_NAMES:
        shown = asked
    else:
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
