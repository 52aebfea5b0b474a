"""The socket: what slow, endless, broken and impolite clients get, and that the real client is served."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator

import httpx
import openai
import psutil
import pytest
from gateway_fakes import FakeBackend, FakeGateway, fake_gateway, ids
from gateway_image_fakes import FakeImageBackend

from serve.errors import ConfigError, RequestFailed
from serve.gateway.server import GatewayServer
from serve.options import GatewayOptions

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


class Served:
    def __init__(self, gateway: FakeGateway, server: GatewayServer, port: int) -> None:
        self.gateway, self.server, self.port = gateway, server, port
        self.url = f"http://127.0.0.1:{port}"

    async def send(self, *parts: bytes) -> bytes:
        """Send raw bytes, then read until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b""
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def served(*backends: FakeBackend, **options) -> AsyncIterator[Served]:
    async with fake_gateway(*backends, **options) as gateway:
        server = GatewayServer(gateway.app, GatewayOptions(port=0, **options), gateway.drain)
        _, port = await server.start()
        try:
            yield Served(gateway, server, port)
        finally:
            await server.aclose()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_openai_client_reads_whole_and_streamed_answers():
    async def scenario():
        async with served() as site:
            client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
            whole = await client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, n=2)
            assert [choice.message.content for choice in whole.choices] == ["Hello there"] * 2
            assert whole.usage.completion_tokens == 16 and whole.choices[0].logprobs.content[0].top_logprobs
            stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there"
            assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-1].usage.total_tokens == 27 and not chunks[-1].choices
            old = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=5, logprobs=1)
            assert [choice.text for choice in old.choices] == ["Hello"] * 2
            assert [model.id async for model in client.models.list()] == ["tiny", "small"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            with pytest.raises(openai.NotFoundError) as refused:
                await client.chat.completions.create(**{**CHAT, "model": "other"})
            assert refused.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**{**CHAT, "max_tokens": 10_000})
            await client.close()

    run(scenario)


def test_openai_client_reads_whole_and_streamed_images():
    async def scenario():
        large = bytes(range(256)) * 4096
        backend = FakeImageBackend(picture=lambda request, index, step: bytes([index, step]) + large)
        async with served(FakeBackend(), backend) as site:
            client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
            asked = {"model": "painter", "prompt": "a red circle", "n": 2, "size": "128x64"}
            ours = {"num_inference_steps": 6, "guidance_scale": 2.0, "seed": 5, "negative_prompt": "a square"}
            whole = await client.images.generate(**asked, output_format="webp", extra_body=ours)
            assert [base64.b64decode(image.b64_json) for image in whole.data] == [bytes([i, 6]) + large for i in (0, 1)]
            assert [image.seed for image in whole.data] == [5, 6] and whole.created > 0
            assert (whole.size, whole.output_format, whole.background) == ("128x64", "webp", "opaque")
            assert whole.num_inference_steps == 6 and whole.scheduler == "flow_match_euler"
            assert whole.usage.input_tokens_details.text_tokens == 7 and whole.usage.total_tokens == 7 + 2 * 16
            assert type(whole).model_validate(whole.model_dump()) and type(whole.usage).model_validate(
                whole.usage.model_dump()
            )
            stream = await client.images.generate(**asked, stream=True, partial_images=1, extra_body=ours)
            events = [event async for event in stream]
            for event in events:
                type(event).model_validate(event.model_dump())  # what the client builds, it does not check
            kinds = [type(event).__name__ for event in events]
            assert kinds == ["ImageGenPartialImageEvent"] * 2 + ["ImageGenCompletedEvent"] * 2
            assert [event.index for event in events] == [0, 1, 0, 1] and events[0].partial_image_index == 0
            assert base64.b64decode(events[-1].b64_json) == bytes([1, 6]) + large
            assert events[-1].usage.output_tokens == 16 and events[-1].seed == 6
            with pytest.raises(openai.BadRequestError) as refused:
                await client.images.generate(model="painter", prompt="x", size="100x64", stream=True)
            assert refused.value.param == "size"
            backend.fail_after = (3, RequestFailed("broken"))
            with pytest.raises(openai.APIError, match="broken"):
                async for _ in await client.images.generate(**asked, stream=True, partial_images=3):
                    pass
            await client.close()

    run(scenario)


def test_closed_connection_cancels_the_images():
    async def scenario():
        backend = FakeImageBackend()
        async with served(backend) as site, httpx.AsyncClient() as client:
            asked = {"prompt": "x", "stream": True, "stream_progress": True, "num_inference_steps": 1000}
            async with client.stream("POST", f"{site.url}/v1/images/generations", json=asked) as answer:
                backend.gate = asyncio.Event()
                await anext(answer.aiter_lines())
            async with asyncio.timeout(5):
                while backend.open:
                    await asyncio.sleep(0.01)
            assert backend.num_cancelled == 1

    run(scenario)


def test_closed_connection_cancels_the_job():
    async def scenario():
        backend = FakeBackend(reply=ids("x") * 200)
        async with served(backend) as site, httpx.AsyncClient() as client:
            async with client.stream(
                "POST", f"{site.url}/v1/chat/completions", json={**CHAT, "stream": True}
            ) as answer:
                await anext(answer.aiter_lines())
                backend.gate = asyncio.Event()
            async with asyncio.timeout(5):
                while backend.open:
                    await asyncio.sleep(0.01)
            assert backend.num_cancelled == 1

    run(scenario)


def test_half_a_head_is_answered_408_and_closed():
    async def scenario():
        async with served(header_timeout_s=0.2) as site:
            assert status(await site.send(HEAD[:40])) == 408
            assert status(await site.send(b"")) == 408

    run(scenario)


def test_head_that_trickles_is_cut_off_too():
    async def scenario():
        async with served(header_timeout_s=0.3) as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)

            async def trickle():
                with contextlib.suppress(ConnectionError):
                    writer.write(HEAD + b"X-Long: ")
                    while True:
                        writer.write(b"X")
                        await writer.drain()
                        await asyncio.sleep(0.05)

            trickling = asyncio.create_task(trickle())
            assert status(await asyncio.wait_for(reader.read(), 5)) == 408
            trickling.cancel()
            writer.close()

    run(scenario)


@pytest.mark.parametrize("size", [20_000, 200 << 20])
def test_huge_header_is_refused_without_buffering_it(size):
    async def scenario():
        async with served() as site:
            before = psutil.Process(os.getpid()).memory_info().rss
            value = b"a" * (1 << 20)
            parts = [value] * (size >> 20) if size > 1 << 20 else [b"a" * size]
            answer = await site.send(HEAD + b"X-Big: ", *parts, b"\r\n\r\n")
            assert status(answer) in (431, 0)
            assert psutil.Process(os.getpid()).memory_info().rss - before < 32 << 20

    run(scenario)


def test_too_many_headers_are_refused():
    async def scenario():
        async with served(max_header_bytes=1 << 20) as site:
            many = b"".join(b"X-%d: y\r\n" % number for number in range(20_000))
            answer = await site.send(HEAD + many + b"\r\n")
            assert status(answer) == 431 and json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"]

    run(scenario)


def test_long_url_is_refused():
    async def scenario():
        async with served() as site:
            assert status(await site.send(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")) == 431

    run(scenario)


def test_declared_large_body_is_refused_before_it_is_read():
    async def scenario():
        async with served() as site:
            answer = await site.send(HEAD + b"Content-Length: 1000000000\r\n\r\n{")
            assert status(answer) == 413 and b"connection: close" in answer.lower()

    run(scenario)


def test_endless_chunked_body_is_cut_off():
    async def scenario():
        async with served(max_body_bytes=1 << 20) as site:
            piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
            answer = await site.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 64)
            assert status(answer) == 413

    run(scenario)


def test_body_that_does_not_arrive_is_answered_408():
    async def scenario():
        async with served(body_timeout_s=0.2) as site:
            assert status(await site.send(HEAD + b"Content-Length: 100\r\n\r\n{")) == 408

    run(scenario)


def test_body_nobody_asked_for_cannot_hold_the_connection():
    """A 404 answers without reading the body; what still comes is cut off after the body's time."""

    async def scenario():
        async with served(body_timeout_s=0.1) as site:
            head = b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
            assert status(await site.send(head)) == 404

    run(scenario)


def test_connections_beyond_the_limit_are_told_so():
    async def scenario():
        async with served(max_connections=2) as site:
            idle = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(2)]
            await asyncio.sleep(0)
            answer = await site.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert status(answer) == 503 and b"retry-after" in answer
            for _, writer in idle:
                writer.close()

    run(scenario)


def test_reader_that_does_not_read_is_cut_off_and_its_job_cancelled():
    async def scenario():
        backend = FakeBackend(reply=ids("word ") * 16_000, card=FakeBackend().card, tokens_per_step=500)
        backend.card = type(backend.card)(**{**_fields(backend.card), "max_model_len": 10_000_000})
        async with served(backend, write_timeout_s=0.3) as site:
            sock = socket.create_connection(("127.0.0.1", site.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({**CHAT, "stream": True, "max_tokens": 5_000_000, "logprobs": True, "top_logprobs": 20})
            sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body.encode())
            async with asyncio.timeout(20):
                while not backend.num_cancelled:
                    await asyncio.sleep(0.02)
            sock.close()
            assert not backend.open

    run(scenario)


def _fields(card):
    return {name: getattr(card, name) for name in card.__dataclass_fields__}


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        HEAD + b"Content-Length: -1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n",
        b"\x00" * 1000,
    ],
)
def test_broken_http_is_refused_in_our_shape(raw):
    async def scenario():
        async with served(header_timeout_s=1) as site:
            answer = await site.send(raw)
            assert status(answer) in (400, 408)
            assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]
            assert (
                status(await site.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) == 200
            )

    run(scenario)


def test_many_pipelined_requests_do_not_pile_up():
    async def scenario():
        backend = FakeBackend(gate=asyncio.Event())
        async with served(backend) as site:
            body = json.dumps(CHAT).encode()
            one = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
            await site.send(one * 100)
            assert len(backend.requests) <= 1

    run(scenario)


def test_idle_keep_alive_connection_is_closed():
    async def scenario():
        async with served(keep_alive_s=0.2) as site:
            answer = await site.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert status(answer) == 200

    run(scenario)


def test_drain_refuses_new_work_and_lets_running_requests_end():
    async def scenario():
        backend = FakeBackend(gate=asyncio.Event())
        async with served(backend) as site, httpx.AsyncClient(base_url=site.url, timeout=10) as client:
            running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            while not backend.open:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(site.server.drain(10))
            await asyncio.sleep(0)
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/livez")).status_code == 200
            refused = await client.post("/v1/chat/completions", json=CHAT)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert refused.headers["connection"] == "close" and int(refused.headers["retry-after"]) > 0
            backend.gate.set()
            assert (await running).status_code == 200
            await draining

    run(scenario)


def test_drain_that_runs_out_ends_streams_with_an_error_event():
    async def scenario():
        backend = FakeBackend(reply=ids("abc") * 50)
        async with served(backend) as site, httpx.AsyncClient(base_url=site.url, timeout=10) as client:
            async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                backend.gate = asyncio.Event()
                await site.server.drain(0.1)
                seen = [line async for line in lines if line]
            assert json.loads(seen[-1].removeprefix("data: "))["error"]["code"] == "draining"
            assert not backend.open

    run(scenario)


def test_taken_port_is_a_clear_error():
    async def scenario():
        async with served() as site:
            other = GatewayServer(site.gateway.app, GatewayOptions(port=site.port))
            with pytest.raises(ConfigError, match="in use"):
                await other.start()

    run(scenario)


def test_two_gateways_share_a_port():
    async def scenario():
        async with fake_gateway() as gateway:
            first = GatewayServer(gateway.app, GatewayOptions(port=0, num_gateways=2))
            _, port = await first.start()
            second = GatewayServer(gateway.app, GatewayOptions(port=port, num_gateways=2))
            await second.start()
            await first.aclose()
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"http://127.0.0.1:{port}/livez")).status_code == 200
            await second.aclose()

    run(scenario)


def test_a_gateway_that_leaves_its_port_to_another_refuses_nobody(monkeypatch):
    """Requests that run, one on a new connection, one on a connection that was idle, and those that come afterwards."""
    monkeypatch.setattr("serve.gateway.server.LEAVING_S", 0.5)

    async def scenario():
        old, new = FakeBackend(gate=asyncio.Event(), replica_id="old"), FakeBackend(replica_id="new")
        async with fake_gateway(old) as first_gateway, fake_gateway(new) as second_gateway:
            options = GatewayOptions(port=0)
            first = GatewayServer(first_gateway.app, options, first_gateway.drain, shares_port=True)
            _, port = await first.start()
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            async with httpx.AsyncClient(timeout=10) as client:
                running = asyncio.create_task(client.post(url, json=CHAT))
                while not old.open:
                    await asyncio.sleep(0.01)
                idle = httpx.AsyncClient(timeout=10)
                assert (await idle.get(f"http://127.0.0.1:{port}/livez")).headers.get("connection") != "close"
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.sleep(0.01)
                second = GatewayServer(second_gateway.app, GatewayOptions(port=port), shares_port=True)
                await second.start()
                leaving = asyncio.create_task(first.hand_over(10))
                await asyncio.sleep(0)
                last = await idle.get(f"http://127.0.0.1:{port}/livez")
                assert last.status_code == 200 and last.headers["connection"] == "close"
                await idle.aclose()
                body = json.dumps(CHAT).encode()
                writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                while len(old.open) < 2:
                    await asyncio.sleep(0.01)
                assert [(await client.post(url, json=CHAT)).status_code for _ in range(5)] == [200] * 5
                assert len(new.requests) == 5
                old.gate.set()
                answer = await running
                assert answer.status_code == 200
                late = await asyncio.wait_for(reader.read(), 10)
                assert status(late) == 200
                writer.close()
                await leaving
            await first.aclose()
            await second.aclose()

    run(scenario)


def test_a_client_whose_stream_ran_while_the_gateway_left_is_answered_once_more(monkeypatch):
    """The stream's head had not said that the connection ends, so its client goes on with it."""
    monkeypatch.setattr("serve.gateway.server.LEAVING_S", 0.3)

    async def scenario():
        class OneStep(asyncio.Event):
            """One may pass before it is set."""

            has_passed = False

            async def wait(self) -> bool:
                if self.has_passed:
                    return await super().wait()
                self.has_passed = True
                return True

        backend = FakeBackend(gate=OneStep())
        async with fake_gateway(backend) as gateway:
            server = GatewayServer(gateway.app, GatewayOptions(port=0), gateway.drain, shares_port=True)
            _, port = await server.start()
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            async with httpx.AsyncClient(timeout=10) as client:
                async with client.stream("POST", url, json=CHAT | {"stream": True}) as response:
                    assert response.status_code == 200 and response.headers.get("connection") != "close"
                    leaving = asyncio.create_task(server.hand_over(10))
                    await asyncio.sleep(0)
                    backend.gate.set()
                    lines = [line async for line in response.aiter_lines()]
                assert lines[-2:] == ["data: [DONE]", ""]
                again = await client.post(url, json=CHAT)  # there is nobody else to connect to
                assert again.status_code == 200 and again.headers["connection"] == "close"
                await leaving
            await server.aclose()

    run(scenario)


def test_a_client_that_connected_as_the_gateway_left_is_answered():
    """It waits in the socket when that closes, and there is no other connection."""

    async def scenario():
        async with fake_gateway() as gateway:
            server = GatewayServer(gateway.app, GatewayOptions(port=0), gateway.drain, shares_port=True)
            _, port = await server.start()
            with socket.create_connection(("127.0.0.1", port)) as client:  # nobody has looked at it yet
                client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await server.hand_over(10)
                client.settimeout(5)
                answer = client.recv(1 << 16)
            assert status(answer) == 200 and b"connection: close" in answer
            await server.aclose()

    run(scenario)
