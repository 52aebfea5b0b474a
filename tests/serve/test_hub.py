"""The hub: one registry, one set of metrics, whoever comes, goes or comes back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve import hub_client as client_module
from serve import registry as registry_module
from serve import wire
from serve.errors import Unavailable
from serve.hub import Hub
from serve.hub_client import HubClient
from serve.recorder import Recorder
from serve.registry import Registry
from serve.wire import ReplicaEntry

SECRET = b"s" * 32
TOKENS = "tandem_output_tokens_total"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def address(tmp_path) -> str:
    return f"unix:{tmp_path}/hub"


@contextlib.asynccontextmanager
async def running(address: str, **options: Any) -> AsyncIterator[Hub]:
    hub = Hub(SECRET, **options)
    await hub.start(address)
    try:
        yield hub
    finally:
        await hub.aclose()


@contextlib.asynccontextmanager
async def member(address: Any, process: str, recorder: Recorder | None = None) -> AsyncIterator[HubClient]:
    client = await HubClient.connect(address, secret=SECRET, process=process, recorder=recorder)
    try:
        yield client
    finally:
        await client.aclose()


def recorder(process: str, model: str = "m") -> Recorder:
    made = Recorder(process, "replica" if process.startswith("replica") else "gateway")
    made.admit(model)
    return made


def entry(replica_id: str, model: str = "m") -> ReplicaEntry:
    return ReplicaEntry(replica_id, model, "text", f"unix:/{replica_id}")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def samples(text: str, name: str) -> dict[str, float]:
    """Process → value."""
    return {
        sample.labels["process"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels.get("model", "m") == "m"
    }


# -- the registry --------------------------------------------------------------------------------------------------


def test_gateways_learn_of_replicas_that_come_and_go(address):
    async def test() -> None:
        async with running(address) as hub, member(address, "gateway-0") as gateway:
            heard: list[list[ReplicaEntry]] = []
            gateway.watch(heard.append)
            async with member(address, "replica-1") as one, member(address, "replica-0") as zero:
                await one.register(entry("replica-1"))
                await zero.register(entry("replica-0"))
                assert hub.entries() == [entry("replica-0"), entry("replica-1")]
                await until(lambda: heard[-1:] == [hub.entries()])
                late: list[list[ReplicaEntry]] = []
                gateway.watch(late.append)
                assert late == [hub.entries()]
                assert samples(await gateway.render(), "tandem_replicas") == {"hub": 2}
                async with member(address, "replica-2") as coming:
                    await coming.register(dataclasses.replace(entry("replica-2"), address=""))
                    assert len(hub.entries()) == 3
                    assert samples(await gateway.render(), "tandem_replicas") == {"hub": 2}
            await until(lambda: heard[-1] == [])
            assert samples(await gateway.render(), "tandem_replicas") == {"hub": 0}

    run(test)


class Follower:
    """Connected by hand: what the hub writes to a process, frame by frame."""

    def __init__(self, connection):
        self.frames: list[wire.Frame] = []
        self.connection = connection
        connection.attach(self)

    def received(self, frame: wire.Frame) -> None:
        self.frames.append(frame)

    def gather(self):
        return ()

    def writable(self) -> None: ...

    def lost(self, reason: str) -> None: ...

    @classmethod
    async def join(cls, address: str, process: str) -> Follower:
        accepts = frozenset({wire.Entries, wire.Change, wire.Exposition})
        made = cls(await client_module.connect(address, secret=SECRET, purpose="hub", accepts=accepts))
        made.connection.send(wire.Join(process, "life"))
        return made


def test_followers_are_told_all_once_and_then_what_changes_and_replicas_only_of_themselves(address):
    async def test() -> None:
        async with running(address) as hub, member(address, "replica-0") as zero:
            await zero.register(entry("replica-0"))
            gateway, replica = await Follower.join(address, "gateway-0"), await Follower.join(address, "replica-1")
            gateway.connection.send(wire.Follow())
            await until(lambda: gateway.frames == [wire.Entries([entry("replica-0")])])
            coming = dataclasses.replace(entry("replica-1"), address="")
            for said in (coming, entry("replica-1")):
                replica.connection.send(wire.Register(said))
                await until(lambda said=said: replica.frames[-1:] == [wire.Change([said], [])])
            await zero.aclose()
            await until(lambda: gateway.frames[-1] == wire.Change([], ["replica-0"]))
            told = [entry for frame in gateway.frames[1:] for entry in frame.came]
            assert told[-1] == entry("replica-1") and {each.replica_id for each in told} == {"replica-1"}
            assert len(replica.frames) == 2 and hub.entries() == [entry("replica-1")]
            gateway.connection.close()
            replica.connection.close()

    run(test)


def test_a_change_is_encoded_once_however_many_follow(monkeypatch):
    encoded: list[wire.Frame] = []
    monkeypatch.setattr(registry_module.wire, "encode", lambda frame: encoded.append(frame) or wire.HEADER.pack(0, 0))

    async def test() -> None:
        registry, told = Registry(Recorder("hub", "hub")), []
        for _ in range(50):
            registry.follow(lambda frame: told.append(frame))
        encoded.clear()
        told.clear()
        for number in range(3):  # in one turn of the event loop
            registry.put(entry(f"replica-{number}"))
        registry.remove(entry("replica-1"))
        await until(lambda: len(told) == 50)
        assert encoded == [wire.Change([entry("replica-0"), entry("replica-2")], ["replica-1"])]

    run(test)


def test_starts_of_replicas_are_counted_and_lost_connections_are_none(address):
    async def test() -> None:
        clock = Clock()
        async with running(address, clock=clock), member(address, "gateway-0", recorder("gateway-0")) as gateway:
            for _ in range(2):
                async with member(address, "replica-0", recorder("replica-0")) as replica:
                    await replica.register(entry("replica-0"))
                    replica._connection.abort("as if the network had failed")
                    replica._registered.clear()
                    await replica._registered.wait()
            assert samples(await gateway.render(), "tandem_replica_starts_total") == {"hub": 2}
            clock.now += 3
            assert samples(await gateway.render(), "tandem_snapshot_age_seconds") == {"gateway-0": 0, "replica-0": 3}

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_process_that_comes_back_replaces_its_older_connection(address):
    async def test() -> None:
        async with running(address) as hub, member(address, "replica-0") as old:
            await old.register(entry("replica-0", "old"))
            async with member(address, "replica-0") as new:
                await new.register(entry("replica-0", "new"))
                assert hub.entries() == [entry("replica-0", "new")]

    run(test)


def test_a_hub_that_is_restarted_is_joined_again_and_gateways_do_not_drop_replicas_meanwhile(address, monkeypatch):
    monkeypatch.setattr(client_module, "SETTLE_S", 0.5)

    async def test() -> None:
        addresses = ["tcp:127.0.0.1:1", address]
        asked = 0

        async def find() -> str:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise OSError("nobody knows the address yet")
            return addresses.pop(0) if len(addresses) > 1 else addresses[0]

        async with contextlib.AsyncExitStack() as stack:
            async with running(address):
                gateway = await stack.enter_async_context(member(find, "gateway-0"))
                replica = await stack.enter_async_context(member(address, "replica-0"))
                heard: list[list[ReplicaEntry]] = []
                gateway.watch(heard.append)
                await replica.register(entry("replica-0"))
                await until(lambda: heard[-1:] == [[entry("replica-0")]])
            with pytest.raises(Unavailable, match="hub"):
                await gateway.render()
            async with running(address) as restarted:
                await until(lambda: restarted.entries() == [entry("replica-0")])
                await until(lambda: gateway._settling is None and gateway._connection is not None)
                assert [] not in heard[1:] and heard[-1] == [entry("replica-0")]

    run(test)


# -- metrics -------------------------------------------------------------------------------------------------------


def test_counters_never_fall_between_gateways_and_add_up(address, monkeypatch):
    monkeypatch.setattr(client_module, "PUSH_PERIOD_S", 0.01)

    async def test() -> None:
        recorders = {name: recorder(name) for name in ("gateway-0", "gateway-1", "replica-0", "replica-1")}
        async with running(address), contextlib.AsyncExitStack() as stack:
            clients = {
                name: await stack.enter_async_context(member(address, name, made)) for name, made in recorders.items()
            }
            gateways = [clients["gateway-0"], clients["gateway-1"]]
            last: dict[str, float] = {}
            for turn in range(40):
                recorders[f"gateway-{turn % 2}"].count(TOKENS, turn, model="m")
                recorders[f"replica-{turn % 2}"].count("tandem_preemptions_total", model="m")
                now = samples(await gateways[turn // 2 % 2].render(), TOKENS)
                assert all(now[process] >= value for process, value in last.items())
                last = now
            await asyncio.gather(*(client.render() for client in gateways))  # a scrape pushes what its gateway counted
            texts = [await client.render() for client in gateways]
            assert sum(samples(texts[0], TOKENS).values()) == sum(range(40))
            assert samples(texts[0], TOKENS) == samples(texts[1], TOKENS)
            while sum(samples(await gateways[0].render(), "tandem_preemptions_total").values()) < 40:
                await asyncio.sleep(0.01)

    run(test)


def test_the_last_snapshot_is_pushed_at_the_end(address):
    async def test() -> None:
        made = recorder("gateway-0")
        async with running(address) as hub:
            async with member(address, "gateway-0", made):
                made.count(TOKENS, 7, model="m")
            await until(lambda: not hub._members)
            assert samples(hub.render(), TOKENS) == {"gateway-0": 7}

    run(test)


def test_series_of_a_dead_process_end_after_the_stated_time(address):
    async def test() -> None:
        clock = Clock()
        async with running(address, expiry_s=15, clock=clock) as hub:
            async with (
                member(address, "gateway-0", recorder("gateway-0")),
                member(address, "gateway-1", recorder("gateway-1")),
            ):
                await until(lambda: len(samples(hub.render(), TOKENS)) == 2)
            await until(lambda: not hub._members)
            clock.now = 14.9
            assert set(samples(hub.render(), TOKENS)) == {"gateway-0", "gateway-1"}
            clock.now = 15.1
            assert samples(hub.render(), TOKENS) == {}
            assert samples(hub.render(), "tandem_process_start_time_seconds").keys() == {"hub"}

    run(test)


def test_counters_of_a_process_that_is_restarted_go_on_and_its_gauges_start_anew(address):
    async def test() -> None:
        async with running(address) as hub:
            first, second = recorder("gateway-0"), recorder("gateway-0")
            async with member(address, "gateway-0", first):
                first.count(TOKENS, 7, model="m")
                first.observe("tandem_request_output_tokens", 7, model="m")
                first.set("tandem_http_requests_in_flight", 3)
            async with member(address, "gateway-0", second) as client:
                assert samples(await client.render(), TOKENS) == {"gateway-0": 7}
                second.count(TOKENS, 2, model="m")
                second.observe("tandem_request_output_tokens", 2, model="m")
                text = await client.render()
                assert samples(text, TOKENS) == {"gateway-0": 9}
                assert samples(text, "tandem_request_output_tokens_sum") == {"gateway-0": 9}
                assert samples(text, "tandem_request_output_tokens_count") == {"gateway-0": 2}
                assert samples(text, "tandem_http_requests_in_flight") == {}
            async with member(address, "gateway-0", recorder("gateway-0")):
                assert samples(hub.render(), TOKENS) == {"gateway-0": 9}

    run(test)


def test_a_reconnection_of_the_same_life_counts_nothing_twice(address):
    async def test() -> None:
        made = recorder("gateway-0")
        async with running(address) as hub, member(address, "gateway-0", made) as client:
            made.count(TOKENS, 5, model="m")
            await client.render()
            for connected in list(hub._members):
                connected.connection.abort("cut by the test")
            cut = client._connection
            await until(lambda: client._connection not in (None, cut))
            assert samples(await client.render(), TOKENS) == {"gateway-0": 5}

    run(test)


# -- trouble -------------------------------------------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_is_named_after_a_bounded_time(address):
    async def test() -> None:
        with pytest.raises(Unavailable, match="hub cannot be reached: nothing answers"):
            await HubClient.connect(address, secret=SECRET, process="gateway-0", timeout_s=0.3)
        async with running(address):
            with pytest.raises(Unavailable, match="secret"):
                await HubClient.connect(address, secret=b"x" * 32, process="gateway-0", timeout_s=0.3)
        with pytest.raises(ValueError, match="give unix:"):
            await HubClient.connect("nowhere", secret=SECRET, process="gateway-0")

    run(test)


@pytest.mark.parametrize("frame", [wire.Register(entry("x")), wire.Follow(), wire.Scrape(1), wire.Join("", "life")])
def test_frames_before_a_name_end_the_connection(address, frame):
    async def test() -> None:
        async with running(address) as hub:
            connection = await client_module.connect(
                address, secret=SECRET, purpose="hub", accepts=frozenset({wire.Entries, wire.Exposition})
            )
            connection.send(frame)
            await connection.wait_closed()
            assert hub.entries() == []

    run(test)
