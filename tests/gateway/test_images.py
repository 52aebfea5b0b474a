"""Images, driven over ASGI by hand: wire format, defaults, previews, refusals, cancelling, failures."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest
from gateway_fakes import Client, FakeBackend, call, fake_gateway
from gateway_image_fakes import LATENT_TOKENS, FakeImageBackend, image_card, picture

from serve.errors import Draining, Overloaded, ReplicaLost, RequestFailed
from serve.gateway.wire import BASE64_BYTES

PATH = "/v1/images/generations"
PARTIAL, PROGRESS, COMPLETED = (f"image_generation.{name}" for name in ("partial_image", "progress", "completed"))


def body(**fields):
    return {"model": "painter", "prompt": "a red circle", **fields}


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 30))


def ask(backend: FakeImageBackend | None = None, *, headers=None, **fields):
    async def scenario():
        async with fake_gateway(FakeBackend(), backend or FakeImageBackend()) as gateway:
            return await call(gateway, PATH, body(**fields), headers=headers or {})

    return run(scenario)


def refused(reply, param: str) -> str:
    error = reply.json()["error"]
    assert reply.status == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    return error["message"]


def decoded(entry) -> bytes:
    return base64.b64decode(entry["b64_json"], validate=True)


def test_whole_answer_has_openais_fields_and_the_effective_values():
    backend = FakeImageBackend()
    answer = ask(backend, seed=7).json()
    [request] = backend.requests
    assert answer.pop("created") > 0 and answer.pop("id").startswith("img-")
    [image] = answer.pop("data")
    assert image["seed"] == 7 and decoded(image) == picture(request, 0, 4)
    assert answer == {
        "model": "painter",
        "background": "opaque",
        "output_format": "png",
        "size": "64x64",
        "seed": 7,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "scheduler": "flow_match_euler",
        "output_compression": 100,
        "usage": {
            "input_tokens": 7,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 7},
            "output_tokens": LATENT_TOKENS,
            "output_tokens_details": {"image_tokens": LATENT_TOKENS, "text_tokens": 0},
            "total_tokens": 7 + LATENT_TOKENS,
        },
    }


def test_fields_reach_the_replica():
    backend = FakeImageBackend()
    sent = {
        "negative_prompt": "a square", "num_inference_steps": 9, "guidance_scale": 2.0, "seed": 5, "n": 3,
        "output_format": "webp", "output_compression": 70,
    }  # fmt: skip
    scheduler = "flow_match_euler_stochastic"
    reply = ask(backend, **sent, size="128x64", scheduler=scheduler, priority=-3, timeout=12.5)
    assert reply.status == 200
    [request] = backend.requests
    assert {name: getattr(request, name) for name in sent} == sent
    assert (request.width, request.height, request.solver) == (128, 64, scheduler)
    assert (request.prompt, request.priority, request.timeout_s) == ("a red circle", 3, 12.5)
    answer = reply.json()
    assert (answer["size"], answer["scheduler"], answer["output_compression"]) == ("128x64", scheduler, 70)
    assert answer["usage"]["input_tokens"] == 7, "the prompt of n images counts once"
    assert answer["usage"]["output_tokens"] == 3 * LATENT_TOKENS


def test_what_is_not_said_is_the_models_own():
    backend = FakeImageBackend(card=image_card(width=128, height=96, num_inference_steps=6, guidance_scale=1.0))
    answer = ask(backend, size="auto").json()
    [request] = backend.requests
    assert (request.width, request.height, request.num_inference_steps, request.guidance_scale) == (128, 96, 6, 1.0)
    assert (request.negative_prompt, request.num_previews, request.output_format) == ("", 0, "png")
    assert (answer["size"], answer["num_inference_steps"], answer["guidance_scale"]) == ("128x96", 6, 1.0)


def test_guidance_of_zero_is_not_the_default():
    backend = FakeImageBackend()
    ask(backend, guidance_scale=0)
    assert backend.requests[0].guidance_scale == 0


def test_seed_is_drawn_told_and_counted_up():
    first, second = (ask(n=3).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert [image["seed"] for image in first["data"]] == [first["seed"] + i for i in range(3)]
    assert 0 <= first["seed"] < 1 << 32


def test_told_values_give_the_same_image_again():
    first = ask(num_inference_steps=3).json()
    told = {name: first[name] for name in ("size", "seed", "num_inference_steps", "guidance_scale", "scheduler")}
    assert ask(**told).json()["data"] == first["data"]


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"width": 128, "height": 64}, "128x64"),
        ({"width": 128, "height": 64, "size": "128x64"}, "128x64"),
        ({"width": 128, "height": 64, "size": "auto"}, "128x64"),
        ({"size": "64x128"}, "64x128"),
        ({"size": None}, "64x64"),
    ],
)
def test_size_is_said_in_either_way(fields, size):
    assert ask(**fields).json()["size"] == size


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"width": 128, "height": 64, "size": "64x64"}, "size"),
        ({"width": 128}, "height"),
        ({"height": 128}, "width"),
        ({"size": "100x64"}, "size"),
        ({"width": 100, "height": 64}, "width"),
        ({"size": "512x512"}, "size"),
        ({"width": 512, "height": 512}, "width"),
        ({"scheduler": "unknown"}, "scheduler"),
        ({"partial_images": 1}, "partial_images"),
        ({"stream_progress": True}, "stream_progress"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 50, "output_format": "png"}, "output_compression"),
    ],
)
def test_refusals_name_the_field_that_was_used(fields, param):
    backend = FakeImageBackend()
    assert refused(ask(backend, **fields), param)
    assert not backend.requests


@pytest.mark.parametrize("fields", [{"partial_images": 0}, {"stream_progress": False}, {"output_compression": 100}])
def test_values_that_ask_for_nothing_are_taken(fields):
    assert ask(**fields).status == 200


def test_urls_are_refused_with_the_remedy():
    assert "b64_json" in refused(ask(response_format="url"), "response_format")
    assert ask(response_format="b64_json").status == 200


def test_callers_identifier_comes_back():
    assert ask(safety_identifier="u-1", user="u-2").json()["safety_identifier"] == "u-1"
    assert ask(user="u-2").json()["safety_identifier"] == "u-2"
    assert "safety_identifier" not in ask().json()


def test_stream_is_previews_then_the_image():
    reply = ask(stream=True, partial_images=2, num_inference_steps=6, seed=3, size="128x64")
    assert reply.headers["content-type"].startswith("text/event-stream") and reply.is_complete
    assert reply.names() == [PARTIAL, PARTIAL, COMPLETED] and "[DONE]" not in reply.data()
    events = reply.chunks()
    assert [event["type"] for event in events] == reply.names()
    for number, event in enumerate(events[:2]):
        assert event["partial_image_index"] == number and event["step"] == 2 * (number + 1)
        assert decoded(event) == f"png 128x64 3 {event['step']}".encode()
    for event in events:
        assert event["created_at"] > 0 and event["size"] == "128x64" and event["output_format"] == "png"
        assert event["quality"] == "auto" and event["background"] == "opaque" and event["index"] == 0
    last = events[-1]
    assert decoded(last) == b"png 128x64 3 6" and last["usage"]["total_tokens"] == 7 + LATENT_TOKENS
    assert (last["seed"], last["num_inference_steps"], last["guidance_scale"]) == (3, 6, 3.5)


def test_stream_without_previews_is_one_event():
    assert ask(stream=True).names() == [COMPLETED]


def test_progress_comes_when_asked_for():
    reply = ask(stream=True, stream_progress=True, num_inference_steps=3)
    assert reply.names() == [PROGRESS] * 3 + [COMPLETED]
    assert reply.chunks()[:3] == [{"type": PROGRESS, "index": 0, "step": step, "num_steps": 3} for step in (1, 2, 3)]


def test_streamed_images_of_one_request_are_told_apart():
    reply = ask(stream=True, n=2, partial_images=1, stream_progress=True, seed=10)
    for index in range(2):
        own = [event for event in reply.chunks() if event["index"] == index]
        assert [event["type"] for event in own] == [PROGRESS] * 2 + [PARTIAL] + [PROGRESS] * 2 + [COMPLETED]
        assert own[-1]["seed"] == 10 + index and decoded(own[-1]) == f"png 64x64 {10 + index} 4".encode()
        assert own[-1]["usage"]["output_tokens"] == LATENT_TOKENS


@pytest.mark.parametrize("size", [0, 1, BASE64_BYTES - 1, BASE64_BYTES, BASE64_BYTES + 1, 3 * BASE64_BYTES + 2])
@pytest.mark.parametrize("is_stream", [False, True])
def test_files_of_any_size_arrive_whole(size, is_stream):
    data = bytes(i * 7 % 251 for i in range(size))
    reply = ask(FakeImageBackend(picture=lambda *_: data), stream=is_stream)
    entry = reply.chunks()[-1] if is_stream else reply.json()["data"][0]
    assert decoded(entry) == data
    assert max(map(len, reply.parts)) < 2 * BASE64_BYTES, "one write, and one turn of the event loop, is bounded"
    if not is_stream:
        assert int(reply.headers["content-length"]) == len(reply.body)


def test_a_large_image_leaves_others_their_turn():
    """The event loop turns between the parts of a file: 20 of them here, and the neighbour counts the turns."""

    async def scenario():
        backend = FakeImageBackend(picture=lambda *_: bytes(20 * BASE64_BYTES))
        async with fake_gateway(backend) as gateway:
            turns = 0
            asking = asyncio.create_task(call(gateway, PATH, body(num_inference_steps=1)))
            while not asking.done():
                await asyncio.sleep(0)
                turns += 1
            assert (await asking).status == 200
            return turns

    assert run(scenario) > 20


@pytest.mark.parametrize("is_stream", [False, True])
def test_overload_is_an_http_error(is_stream):
    reply = ask(FakeImageBackend(refusal=Overloaded("full", retry_after_s=2.5)), stream=is_stream)
    assert reply.status == 429 and reply.headers["retry-after"] in ("3", "4")


@pytest.mark.parametrize("is_stream", [False, True])
def test_failure_before_the_first_byte_is_an_http_error(is_stream):
    reply = ask(FakeImageBackend(fail_after=(1, RequestFailed("broken"))), stream=is_stream, partial_images=None)
    assert reply.status == 500 and reply.json()["error"]["code"] == "request_failed"


def test_failure_after_the_first_byte_is_one_error_event_and_no_completed():
    reply = ask(FakeImageBackend(fail_after=(2, RequestFailed("broken"))), stream=True, stream_progress=True)
    assert reply.status == 200 and reply.is_complete
    assert reply.names() == [PROGRESS, PROGRESS, "error"]
    assert json.loads(reply.data()[-1])["error"]["code"] == "request_failed"


def test_failure_amid_an_event_lets_it_end_first():
    """The reader is in the middle of a large event when the server's drain runs out: no half event, then the error."""

    async def scenario():
        data = bytes(5 * BASE64_BYTES)
        backend = FakeImageBackend(picture=lambda *_: data)
        async with fake_gateway(backend) as gateway:

            async def app(scope, receive, send):
                messages = []

                async def stuck(message):
                    messages.append(message)
                    if len(messages) == 3:
                        gateway.drain.abort(Draining("bye"))
                        await asyncio.Event().wait()
                    await send(message)

                await gateway.app(scope, receive, stuck)

            reply = await Client(app).request("POST", PATH, body(stream=True, n=2))
            assert reply.names() == [COMPLETED, "error"] and reply.is_complete
            assert decoded(reply.chunks()[0]) == data
            assert reply.chunks()[1]["error"]["code"] == "draining" and not backend.open

    run(scenario)


def test_images_that_never_come_are_an_error():
    class Short(FakeImageBackend):
        def script(self, request):
            return super().script(request)[:-1]

    assert ask(Short(), n=2).json()["error"]["code"] == ReplicaLost.code
    reply = ask(Short(), n=2, stream=True)
    assert reply.names() == [COMPLETED, "error"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_client_that_leaves_cancels_its_images(is_stream):
    async def scenario():
        backend = FakeImageBackend(gate=asyncio.Event())
        async with fake_gateway(backend) as gateway:
            client = Client(gateway.app)
            asking = asyncio.create_task(client.request("POST", PATH, body(stream=is_stream, n=2)))
            while not backend.open:
                await asyncio.sleep(0)
            client.left.set()
            await asking
            assert not backend.open and backend.num_cancelled == 1 and not client.reply.parts
            assert gateway.metric("tandem_cancellations_total", model="painter") == 1
            assert gateway.metric("tandem_images_total", model="painter", outcome="cancelled") == 2

    run(scenario)


def test_silent_stream_gets_heartbeats_while_queued():
    async def scenario():
        backend = FakeImageBackend(gate=asyncio.Event())
        async with fake_gateway(backend, heartbeat_s=0.1) as gateway:
            client = Client(gateway.app)
            asking = asyncio.create_task(client.request("POST", PATH, body(stream=True)))
            await client.until(lambda reply: len(reply.parts) >= 2)
            assert all(part.startswith(b":") for part in client.reply.parts)
            backend.gate.set()
            assert (await asking).names() == [COMPLETED]

    run(scenario)


def test_metrics_and_log_tell_images_steps_and_previews(caplog):
    async def scenario():
        async with fake_gateway(FakeImageBackend()) as gateway:
            with caplog.at_level("INFO", logger="serve.gateway.telemetry"):
                await call(gateway, PATH, body(n=2, num_inference_steps=5, stream=True, partial_images=1))
            gateway.backend.fail_after = (2, RequestFailed("broken"))
            await call(gateway, PATH, body(n=3))
            await call(gateway, PATH, body(size="100x64"))
            return {
                (name, outcome): gateway.metric(name, model="painter", **({"outcome": outcome} if outcome else {}))
                for name, outcome in (
                    ("tandem_images_total", "success"), ("tandem_images_total", "failed"),
                    ("tandem_image_steps_total", ""), ("tandem_requests_total", "success"),
                    ("tandem_requests_total", "failed"), ("tandem_requests_total", "invalid"),
                    ("tandem_time_to_first_preview_seconds_count", ""),
                    ("tandem_e2e_request_latency_seconds_count", ""), ("tandem_time_to_first_token_seconds_count", ""),
                )
            }  # fmt: skip

    assert list(run(scenario).values()) == [2, 3, 2 * 5 + 3 * 2, 1, 1, 1, 1, 1, 0]
    [line] = [record.message for record in caplog.records]
    assert "images=2" in line and "steps=10" in line and "first_preview_s=" in line and "red circle" not in line


def test_each_kind_of_endpoint_takes_its_own_models():
    async def scenario():
        async with fake_gateway(FakeBackend(), FakeImageBackend()) as gateway:
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            others = {"/v1/chat/completions": chat, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}
            for path, sent in others.items():
                assert "'tiny'" in refused(await call(gateway, path, {**sent, "model": "painter"}), "model")
            assert "'painter'" in refused(await call(gateway, PATH, body(model="tiny")), "model")
            assert (await call(gateway, "/v1/chat/completions", chat)).status == 200, "the only text model"
            assert (await call(gateway, PATH, {"prompt": "x"})).json()["model"] == "painter"
            assert (await call(gateway, PATH, body(model="painter-small"))).json()["model"] == "painter-small"
            assert (await call(gateway, PATH, body(model="other"))).status == 404

    run(scenario)


def test_models_tell_their_kind_and_what_they_can_be_asked_for():
    async def scenario():
        async with fake_gateway(FakeBackend(), FakeImageBackend()) as gateway:
            return (await call(gateway, "/v1/models")).json()["data"]

    models = {model["id"]: model for model in run(scenario)}
    assert models["tiny"]["kind"] == "text" and models["tiny"]["max_model_len"] == 256 and "image" not in models["tiny"]
    painter = models["painter"]
    assert painter["kind"] == "image" and "max_model_len" not in painter
    assert models["painter-small"]["image"] == painter["image"]
    limits = painter["image"]
    assert (limits["width"], limits["height"], limits["num_inference_steps"]) == (64, 64, 4)
    assert limits["solvers"][0] == "flow_match_euler" and limits["sizes"] == [] and limits["has_guidance"] is True


def test_request_id_names_the_answer():
    assert ask(headers={"x-request-id": "job-7"}).json()["id"] == "img-job-7"
    assert ask(request_id="mine").json()["id"] == "img-mine"
