"""One replica of one model: backend, channel, and its place at the hub. A child process or a Ray actor holds one.

A replica does not live on half alive: when its engine dies, or a step hangs, its streams get their error, one line is
logged and the process ends, so that whoever started it starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from serve.autoscaling import Signals
from serve.backend import Backend
from serve.channel_server import ChannelServer
from serve.demand import SAMPLE_PERIOD_S, Demand
from serve.errors import EngineDead
from serve.fingerprint import fingerprint
from serve.hub_client import Address, HubClient
from serve.model_folder import find_model
from serve.options import ModelOptions
from serve.ranks.launch import Launcher
from serve.recorder import EngineObserver, Recorder
from serve.request import ModelCard
from serve.text.prefix_digest import PrefixDigest
from serve.text.speculation.draft_length import AdaptiveLength
from serve.tracing import JobSpans, start_tracing
from serve.wire import ReplicaEntry

log = logging.getLogger(__name__)

EXIT_STATUS = 70
"""Of a process whose engine died (EX_SOFTWARE)."""
LAST_WORDS_S = 0.5
"""Between an engine's death and its process's end: the streams' errors leave."""
WATCH_PERIOD_S = 1.0
HUB_S = 120.0
"""For the hub to be there: on a cluster it is started at the same time, on a node that may be slow."""

OnDeath = Callable[[BaseException], None]


@dataclass(frozen=True, slots=True)
class Served:
    """What a builder makes: the backend and what gateways need to make its text."""

    backend: Backend
    bundle: dict[str, bytes]
    digest: PrefixDigest | None = None
    """Of cached prefixes, where there are any."""
    fingerprint: str = ""
    """Of model and config."""


def build(
    options: ModelOptions,
    observer: EngineObserver,
    on_death: OnDeath,
    *,
    num_replicas_here: int = 1,
    launcher: Launcher | None = None,
) -> Served:
    """Load the model and start its engine. Blocks. Raises ConfigError.

    `num_replicas_here` share this machine's cores and memory. `launcher`: starts the other ranks of a model that has
    several; None: as processes of this machine.
    """
    folder, kind = find_model(options)
    mark = fingerprint(options, folder)  # of the files as they are now: they may be replaced while this one serves
    served = BUILDERS[kind](options, folder, num_replicas_here, observer, on_death, launcher)
    return replace(served, fingerprint=mark)


def _build_text(
    options: ModelOptions,
    folder: Path,
    num_replicas_here: int,
    observer: EngineObserver,
    on_death: OnDeath,
    launcher: Launcher | None,
) -> Served:
    from serve.text.build import build_text
    from serve.text.tokenizer import Tokenizer, TokenizerBundle

    template = None if options.chat_template is None else Path(options.chat_template)
    bundle = TokenizerBundle.from_folder(folder, template)
    Tokenizer(bundle)  # gateways make their own; files that cannot be used end the start here, with the reason
    backend = build_text(
        options,
        folder,
        num_replicas_here=num_replicas_here,
        observer=observer,
        on_death=on_death,
        launcher=launcher,
    )
    scheduler = backend.scheduler
    observer.follow("tandem_kv_cache_blocks", lambda: scheduler.kv_cache.num_blocks)
    observer.follow("tandem_preemptions_total", lambda: scheduler.num_preemptions)
    observer.follow("tandem_prefix_cache_queries_tokens_total", lambda: scheduler.num_prefix_query_tokens)
    observer.follow("tandem_prefix_cache_hits_tokens_total", lambda: scheduler.num_prefix_hit_tokens)
    observer.follow("tandem_kv_cache_usage_ratio", lambda: backend.load().memory)
    if isinstance(scheduler.draft_length, AdaptiveLength):
        follow_speculation(observer, scheduler.draft_length)
    return Served(backend, bundle.files, scheduler.kv_cache.digest)


def follow_speculation(observer: EngineObserver, length: AdaptiveLength) -> None:
    """Metrics of how drafts fare."""
    acceptance = length.acceptance
    observer.follow("tandem_speculation_drafted_tokens_total", lambda: acceptance.num_drafted)
    observer.follow("tandem_speculation_accepted_tokens_total", lambda: acceptance.num_accepted)
    observer.follow("tandem_speculation_mean_accepted_tokens", lambda: acceptance.mean_length)
    observer.follow("tandem_speculation_draft_tokens", lambda: length.current)
    for place in range(length.most):
        observer.follow(
            "tandem_speculation_accepted_at_position_tokens_total",
            partial(acceptance.by_position.__getitem__, place),
            position=str(place + 1),
        )


def _build_image(
    options: ModelOptions,
    folder: Path,
    num_replicas_here: int,
    observer: EngineObserver,
    on_death: OnDeath,
    launcher: Launcher | None,
) -> Served:
    from serve.image.build import build_image

    backend = build_image(
        options,
        folder,
        num_replicas_here=num_replicas_here,
        observer=observer,
        on_death=on_death,
        launcher=launcher,
    )
    return Served(backend, {})


BUILDERS: dict[str, Callable[[ModelOptions, Path, int, EngineObserver, OnDeath, Launcher | None], Served]] = {
    "text": _build_text,
    "image": _build_image,
}
"""Kind → how its backend is made. The imports inside are the process's heavy ones."""


def end_process(status: int) -> None:
    """End this process and those it started, which may be stopped or hang: a closed connection ends only the others."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)


class Replica:
    """Start, drain, close. `server` is the channel's end."""

    def __init__(
        self,
        options: ModelOptions,
        *,
        replica_id: str,
        secret: bytes,
        hub_address: Address,
        address: str,
        build: Callable[[ModelOptions, EngineObserver, OnDeath], Served] = build,
        exit: Callable[[int], None] = end_process,
    ) -> None:
        self._options = options
        self._replica_id = replica_id
        self._secret = secret
        self._hub_address = hub_address
        self._address = address
        self._build = build
        self._exit = exit
        self._is_closed = False
        self._hub: HubClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self._observing: asyncio.Task[None] | None = None
        self._demand: Demand | None = None
        tracing = start_tracing(replica_id)
        self._spans = None if tracing is None else JobSpans(tracing, options.name)
        self.server: ChannelServer

    @property
    def card(self) -> ModelCard:
        return self.server.backend.card

    async def start(self) -> None:
        """Load the model, listen, and tell the hub: at first that one is coming, then where it is.

        Raises ConfigError and Unavailable."""
        recorder = Recorder(self._replica_id, "replica")
        announcing = asyncio.create_task(self._announce(recorder))
        try:
            await self._load(recorder, announcing)
        except BaseException:
            announcing.cancel()
            if self._hub is not None:
                await self._hub.aclose()
            raise

    async def _announce(self, recorder: Recorder) -> HubClient:
        """Beside the loading, for the hub may come up later than this process."""
        hub = self._hub = await HubClient.connect(
            self._hub_address, secret=self._secret, process=self._replica_id, recorder=recorder, timeout_s=HUB_S
        )
        await hub.register(ReplicaEntry(self._replica_id, self._options.name, self._options.kind or "", address=""))
        return hub

    async def _load(self, recorder: Recorder, announcing: asyncio.Task[HubClient]) -> None:
        began = time.monotonic()
        observer = EngineObserver(recorder, self._options.name, self._spans)
        served = await asyncio.to_thread(self._build, self._options, observer, self._on_death)
        backend = served.backend
        observer.follow("tandem_requests_running", lambda: backend.load().running)
        observer.follow("tandem_requests_waiting", lambda: backend.load().waiting)
        observer.follow("tandem_waiting_tokens", lambda: backend.load().tokens_waiting)
        observer.follow("tandem_predicted_backlog_seconds", lambda: backend.load().backlog_s)
        recorder.describe(backend.card)
        self.server = ChannelServer(
            backend, served.bundle, secret=self._secret, replica_id=self._replica_id, digest=served.digest
        )
        address = await self.server.start(self._address)
        card, hub = backend.card, await announcing
        await hub.register(ReplicaEntry(self._replica_id, card.name, card.kind, address, served.fingerprint))
        self._watching = asyncio.create_task(self._watch())
        if self._options.autoscaling_config is not None:
            self._demand = Demand(self._options.autoscaling_config, load_s=time.monotonic() - began)
            self._observing = asyncio.create_task(self._observe(self._demand))
        log.info("replica ready id=%s model=%s address=%s", self._replica_id, card.name, address)

    def signals(self) -> Signals:
        """What scales a model with an `autoscaling_config`; of any other there is nothing to say."""
        return Signals() if self._demand is None else self._demand.signals()

    async def check_health(self) -> None:
        """Raise EngineDead when the engine can no longer serve."""
        await self.server.backend.check_health()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests; return when the accepted ones have ended, or `timeout_s` later."""
        await self.server.drain(timeout_s)

    async def aclose(self) -> None:
        """Leave the hub, end the streams that are left and the engine."""
        self._is_closed = True
        for task in (self._watching, self._observing):
            if task is not None:
                task.cancel()
        if self._hub is not None:
            await self._hub.aclose()
        await self.server.aclose()
        await self.server.backend.aclose()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)

    async def _observe(self, demand: Demand) -> None:
        while True:
            demand.observe(self.server.backend.load(), time.monotonic(), refused_s=self.server.turned_away_s)
            await asyncio.sleep(SAMPLE_PERIOD_S)

    async def _watch(self) -> None:
        """Notice what the engine's thread cannot say itself: that it hangs."""
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                await self.check_health()
            except EngineDead as error:
                self._on_death(error)
                return

    def _on_death(self, cause: BaseException) -> None:
        """End the process, once what has already been said is sent. Any thread, and whatever the event loop does."""
        if self._is_closed:
            return
        self._is_closed = True
        log.critical("replica ends id=%s status=%s cause=%r", self._replica_id, EXIT_STATUS, cause)
        threading.Timer(LAST_WORDS_S, self._exit, (EXIT_STATUS,)).start()
