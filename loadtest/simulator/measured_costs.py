"""Measures `Costs` on this machine, from the code that serves. Microseconds of one core; a quiet machine is needed."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from loadtest.paced import TextDevice, text_replica
from loadtest.simulator.costs import Costs
from loadtest.simulator.rig import Rig, rig
from loadtest.simulator.visit import Visit, visit_with
from serve import wire
from serve.backend import Backend, EventStream, Load
from serve.channel import ChannelClient
from serve.channel_server import ChannelServer
from serve.connection import connect
from serve.gateway.pool import Pool, Remote
from serve.gateway.routing import Router
from serve.gateway.shortlist import NUM_DRAWN
from serve.hub import Hub
from serve.prefix_view import PrefixView
from serve.recorder import Recorder
from serve.registry import Registry
from serve.request import ModelCard, Request
from serve.wire import ReplicaEntry

FAST = TextDevice(base_s=0.010, row_s=0.0, unit_s=0.0, kv_cache_tokens=163_840, max_num_batched_tokens=8192)
NUM_REQUESTS, NUM_PROMPT = 240, 1020
NUM_STREAMS, NUM_TOKENS = 24, 200
NUM_REPORTS = 2000
NUM_FOLLOWERS = 50


async def measure_costs() -> Costs:
    """About 20 s."""
    listed_s, candidate_s, block_s = await _placing()
    request_s, token_s, snapshot = await _gateway()
    change_s, follower_s, update_s = await _announcing()
    report_s, send_report_s = await _reports()
    return Costs(
        request_s=request_s,
        token_s=token_s,
        listed_s=listed_s,
        candidate_s=candidate_s,
        block_s=block_s,
        report_s=report_s,
        send_report_s=send_report_s,
        push_s=_pushes(snapshot),
        change_s=change_s,
        follower_s=follower_s,
        update_s=update_s,
    )


async def _placing() -> tuple[float, float, float]:
    """For each replica there is, for each that is looked at, for each block of a prompt: from pools of 1000, 200, 32
    and 2 replicas, and a long prompt."""
    backend, _ = text_replica(FAST)

    async def place(num_replicas: int, num_prompt: int) -> float:
        async def connect(entry: ReplicaEntry, on_lost: Callable[[], None]) -> Remote:
            return _Told(backend.card)

        names = [f"replica-{number}" for number in range(num_replicas)]
        pool, router = Pool(connect), Router()
        pool.update([ReplicaEntry(name, "paced", backend.card.kind, "unix:/nowhere") for name in names])
        request = visit_with("r", 0.0, tuple(range(num_prompt)), 1).request
        await pool.meet(["paced"])
        while len(pool._able("paced", None)) < num_replicas:
            await asyncio.sleep(0.01)
        seconds = _seconds(lambda: next(router.rounds(request, pool._able("paced", None))), 50)
        await pool.aclose()
        return seconds

    few, all_looked_at, some, many = [await place(number, 32) for number in (2, NUM_DRAWN, 200, 1000)]
    long = await place(200, 32 + 8000)
    await backend.aclose()
    listed_s = (many - some) / 800
    return listed_s, (all_looked_at - few) / (NUM_DRAWN - 2) - listed_s, (long - some) / 500


async def _gateway() -> tuple[float, float, wire.Push]:
    """A request with one token, a further token, and what the gateway pushes to the hub afterwards."""
    async with rig(num_replicas=1, device=FAST) as running:
        await running.ask([_visit(number, 0.0, 16, 8) for number in range(8)])
        requests = [_visit(100 + number, number / 60, NUM_PROMPT, 1) for number in range(NUM_REQUESTS)]
        request_s = await _cpu_s(running, requests) / NUM_REQUESTS
        streams = [_visit(1000 + number, 0.0, NUM_PROMPT, NUM_TOKENS) for number in range(NUM_STREAMS)]
        cpu_s = await _cpu_s(running, streams) - NUM_STREAMS * request_s
        snapshot = running.snapshot("gateway-0")
    return request_s, cpu_s / (NUM_STREAMS * (NUM_TOKENS - 1)), snapshot


async def _cpu_s(running: Rig, visits: list[Visit]) -> float:
    before = running.gateway_cpu_s()
    await running.ask(visits)
    return running.gateway_cpu_s() - before


def _visit(number: int, at_s: float, num_prompt: int, num_output: int) -> Visit:
    ids = tuple(300 + (number * 7919 + place * 31) % 1200 for place in range(num_prompt))
    return visit_with(f"m{number}", at_s, ids, num_output)


async def _reports() -> tuple[float, float]:
    """A load report on its way: both ends and their event loops in one process here, half of it for each."""
    backend = _Changing()
    secret = secrets.token_bytes(32)
    server = ChannelServer(backend, {}, secret=secret, replica_id="replica")
    with tempfile.TemporaryDirectory() as folder:
        client = await ChannelClient.connect(await server.start(f"unix:{folder}/r"), secret=secret, gateway_id="g")
        (session,) = server.sessions.values()
        began = time.perf_counter()
        for number in range(NUM_REPORTS):
            session.is_report_due = True
            session.connection.schedule()
            while client.load().running <= number:
                await asyncio.sleep(0)
        seconds = (time.perf_counter() - began) / NUM_REPORTS
        await client.aclose()
        await server.aclose()
    await backend.aclose()
    return seconds / 2, seconds / 2


def _pushes(push: wire.Push) -> float:
    """A process's snapshot at the hub: read and kept."""
    data = wire.encode(push)
    kind, payload, accepts = data[4], data[wire.HEADER.size :], frozenset({wire.Push})
    return _seconds(lambda: wire.decode(kind, payload, accepts), 200)


async def _announcing() -> tuple[float, float, float]:
    """A change of the list of 1000 replicas at the hub, with nobody told; each gateway that is told, up to the socket;
    and a gateway's own part of it, for each replica on the list."""
    entries = [ReplicaEntry(f"replica-{n}", "model", "text", f"tcp:10.0.0.{n}:7000") for n in range(1000)]
    registry, secret, clients = Registry(Recorder("hub", "hub")), secrets.token_bytes(32), []
    for entry in entries:
        registry.put(entry)

    async def change() -> float:
        rounds = []
        for _ in range(3):
            began = time.perf_counter()
            for entry in entries[:100]:
                registry.put(entry)
                await asyncio.sleep(0)
            rounds.append((time.perf_counter() - began) / 100)
        return min(rounds)

    change_s = await change()
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(secret)
        hub.registry = registry
        address = await hub.start(f"unix:{folder}/hub")
        accepts = frozenset({wire.Entries, wire.Change})
        for number in range(NUM_FOLLOWERS):
            clients.append(client := await connect(address, secret=secret, purpose="hub", accepts=accepts))
            client.send(wire.Join(f"gateway-{number}", "life"))
            client.send(wire.Follow())
        while len(registry._followers) < NUM_FOLLOWERS:
            await asyncio.sleep(0.01)
        for client in clients:
            client._transport.pause_reading()  # they are in this process too
        follower_s = (await change() - change_s) / NUM_FOLLOWERS
        for client in clients:
            client.abort("measured")
        await hub.aclose()
    pool = Pool(lambda entry, on_lost: asyncio.Future())
    pool.update(entries)
    update_s = _seconds(lambda: pool.update(entries), 20) / len(entries)
    await pool.aclose()
    return change_s, follower_s, update_s


def _seconds(call: Callable[[], object], num: int) -> float:
    """Of one call; the best of three rounds."""
    rounds = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(num):
            call()
        rounds.append((time.perf_counter() - began) / num)
    return min(rounds)


class _Changing(Backend):
    """Its load is another one each time it is asked."""

    def __init__(self) -> None:
        self._inner, _ = text_replica(FAST)
        self._load = Load()

    @property
    def card(self) -> ModelCard:
        return self._inner.card

    async def submit(self, request: Request) -> EventStream:
        return await self._inner.submit(request)

    def load(self) -> Load:
        self._load = replace(self._load, running=self._load.running + 1)
        return self._load

    async def check_health(self) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Told(Backend):
    """A `Remote` that has reported and is asked for nothing."""

    is_alive, is_draining = True, False
    unreported = ("a",)
    bundle: Mapping[str, bytes] = {}

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._load = Load(running=20, backlog_s=0.4, unit_s=2e-4, job_s=0.03)
        self.prefixes = PrefixView()
        self.prefixes.block_size = 16

    @property
    def card(self) -> ModelCard:
        return self._card

    def load(self) -> Load:
        return self._load

    def turn_away(self, work_s: float) -> None: ...

    async def submit(self, request: Request) -> EventStream:
        raise NotImplementedError

    async def check_health(self) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def aclose(self) -> None: ...
