"""The whole gateway: hub, channel, socket. Only the engine is a fake."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from gateway_fakes import FakeBackend, card, entry, ids
from gateway_image_fakes import FakeImageBackend

from serve.channel_server import ChannelServer
from serve.errors import ConfigError, EngineDead
from serve.gateway.gateway import Gateway
from serve.hub import Hub
from serve.hub_client import HubClient
from serve.options import GatewayOptions
from serve.recorder import Recorder

SECRET = b"0" * 32
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
LONG = {**CHAT, "stream": True, "max_tokens": 190}


class Stack:
    """A hub, replicas and gateways, over Unix sockets below `path`."""

    def __init__(self, path: Path, stack: contextlib.AsyncExitStack) -> None:
        self._path = path
        self._stack = stack
        self.hub_address = ""

    async def start(self) -> None:
        hub = Hub(SECRET)
        self.hub_address = await hub.start(f"unix:{self._path}/hub")
        self._stack.push_async_callback(hub.aclose)

    async def replica(self, backend: FakeBackend) -> ChannelServer:
        name = backend.replica_id
        server = ChannelServer(backend, backend.bundle, secret=SECRET, replica_id=name)
        address = await server.start(f"unix:{self._path}/{name}")
        self._stack.push_async_callback(server.aclose)
        client = await HubClient.connect(
            self.hub_address, secret=SECRET, process=name, recorder=Recorder(name, "replica")
        )
        self._stack.push_async_callback(client.aclose)
        await client.register(entry(name, backend.card.name, address, backend.card.kind))
        return server

    async def gateway(self, name: str = "gateway-0", **options) -> tuple[Gateway, httpx.AsyncClient]:
        gateway = Gateway(
            GatewayOptions(port=0, **options), gateway_id=name, secret=SECRET, hub_address=self.hub_address
        )
        url = await gateway.start()
        self._stack.push_async_callback(gateway.aclose)
        client = await self._stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=10))
        return gateway, client


@contextlib.asynccontextmanager
async def stack(path: Path) -> AsyncIterator[Stack]:
    async with contextlib.AsyncExitStack() as resources:
        made = Stack(path, resources)
        await made.start()
        yield made


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def ready(client: httpx.AsyncClient) -> None:
    async def is_ready() -> bool:
        return (await client.get("/readyz")).status_code == 200

    await until(is_ready)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_gateway_serves_what_the_hub_names(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            gateway, client = await site.gateway()
            early = await client.post("/v1/chat/completions", json=CHAT)
            assert early.status_code == 503 and early.headers["retry-after"]
            backend = FakeBackend(num_cached=3)
            await site.replica(backend)
            await ready(client)
            answer = (await client.post("/v1/chat/completions", json=CHAT)).json()
            assert answer["choices"][0]["message"]["content"] == "Hello there"
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
            assert [model.name for model in gateway.cards()] == ["tiny"]
            gateway.check_health()
            text = (await client.get("/metrics")).text
            assert 'tandem_requests_total{endpoint="chat",model="tiny",outcome="success",process="gateway-0"} 1' in text

    run(scenario)


def test_any_gateway_shows_the_metrics_of_all(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            await site.replica(FakeBackend())
            clients = [(await site.gateway(f"gateway-{number}"))[1] for number in range(2)]
            for client in clients:
                await ready(client)
                await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3})

            async def both_shown() -> bool:
                texts = [(await client.get("/metrics")).text for client in clients]
                return all(f'process="gateway-{number}"' in text for text in texts for number in range(2))

            await until(both_shown)

    run(scenario)


def test_client_that_leaves_cancels_across_the_channel(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            backend = FakeBackend(reply=ids("x") * 200)
            await site.replica(backend)
            _, client = await site.gateway()
            await ready(client)
            async with client.stream("POST", "/v1/chat/completions", json=LONG) as answer:
                await anext(answer.aiter_lines())
                backend.gate = asyncio.Event()

            async def is_free() -> bool:
                return not backend.open

            await until(is_free)

    run(scenario)


def test_lost_replicas_stream_goes_on_when_another_comes_up(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            first = FakeBackend(reply=ids("x") * 200, replica_id="first")
            server = await site.replica(first)
            _, client = await site.gateway()
            await ready(client)
            async with client.stream("POST", "/v1/chat/completions", json=LONG) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                first.gate = asyncio.Event()
                await server.aclose()
                await site.replica(FakeBackend(reply=ids("x") * 200, replica_id="second"))
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]" and "error" not in "".join(rest)
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    run(scenario)


def test_two_models_are_told_apart(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            await site.replica(FakeBackend(replica_id="a"))
            other = card("org/other", aliases=())
            await site.replica(FakeBackend(replica_id="b", card=other, reply=ids("other")))
            gateway, client = await site.gateway()

            async def has_both() -> bool:
                return len(gateway.cards()) == 2

            await until(has_both)
            answer = (await client.post("/v1/completions", json={"model": "org/other", "prompt": "a"})).json()
            assert answer["choices"][0]["text"] == "other" and answer["model"] == "org/other"
            assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 400
            assert (await client.get("/v1/models/org/other")).json()["id"] == "org/other"

    run(scenario)


def test_text_and_images_are_served_side_by_side(tmp_path):
    """Ten images of 5 MB cross the channel while chats are answered; neither names its model."""

    async def scenario():
        async with stack(tmp_path) as site:
            data = bytes(range(250)) * 20_000
            await site.replica(FakeBackend())
            await site.replica(FakeImageBackend(picture=lambda request, index, step: bytes([index]) + data))
            gateway, client = await site.gateway()
            async with asyncio.timeout(10):
                await gateway.meet(["tiny", "painter"])
            drawing = asyncio.create_task(client.post("/v1/images/generations", json={"prompt": "x", "n": 10}))
            num_chats = 0
            while not drawing.done():
                assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
                num_chats += 1
            images = (await drawing).json()["data"]
            assert [base64.b64decode(image["b64_json"]) for image in images] == [bytes([i]) + data for i in range(10)]
            assert num_chats > 1
            text = (await client.get("/metrics")).text
            assert 'tandem_requests_total{endpoint="images",model="painter",outcome="success"' in text
            assert 'tandem_images_total{model="painter",outcome="success",process="gateway-0"} 10' in text

    run(scenario)


def test_refusals_of_an_image_replica_cross_the_channel(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            await site.replica(FakeImageBackend())
            _, client = await site.gateway()
            await ready(client)
            sent = {"prompt": "x", "width": 100, "height": 64, "stream": True}
            reply = await client.post("/v1/images/generations", json=sent)
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "width"

    run(scenario)


def test_drained_gateway_refuses_and_says_so(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            await site.replica(FakeBackend())
            gateway, client = await site.gateway()
            await ready(client)
            await gateway.drain(1)
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.post("/v1/chat/completions", json=CHAT)).json()["error"]["code"] == "draining"
            await gateway.aclose()
            with pytest.raises(EngineDead):
                gateway.check_health()

    run(scenario)


def test_public_address_without_keys_is_refused_at_start(tmp_path):
    async def scenario():
        async with stack(tmp_path) as site:
            with pytest.raises(ConfigError, match="--api-key"):
                await site.gateway(host="0.0.0.0")
            _, client = await site.gateway(host="0.0.0.0", api_key=("k",))
            assert client.base_url.host == "127.0.0.1"
            assert (await client.get("/v1/models")).status_code == 401

    run(scenario)
