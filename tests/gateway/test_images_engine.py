"""Images from HTTP to the step loop and back: gateway, channel, backend and engine are real, the device is a fake."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
from pathlib import Path

import pytest
from gateway_fakes import Client, FakeGateway, call, card, fake_gateway
from image_device import ImageDevice, limits, make_scheduler
from PIL import Image

from serve.channel import ChannelClient
from serve.channel_server import ChannelServer
from serve.engine.engine import Engine
from serve.image.backend import ImageBackend
from serve.image.trajectory import ImageBatch, ImageOutput

PATH = "/v1/images/generations"
SECRET = b"0" * 32


class PixelDevice(ImageDevice):
    """Shows each latent's hash as an even colour; steps wait for `gate`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def collect(self, handle: ImageBatch) -> ImageOutput:
        assert self.gate.wait(20)
        output = super().collect(handle)
        sizes = [row.job.width * row.job.height for row in handle.rows]
        output.pixels = [
            (int(shown) % (1 << 24)).to_bytes(3, "big") * size
            for shown, size in zip(output.pixels, sizes, strict=False)
        ]
        return output


class Site:
    """One replica behind a channel, and a gateway over it."""

    def __init__(self, gateway: FakeGateway, backend: ImageBackend, device: PixelDevice) -> None:
        self.gateway, self.backend, self.device = gateway, backend, device

    async def ask(self, **fields):
        return await call(self.gateway, PATH, {"prompt": "a red circle", **fields})

    async def idle(self) -> None:
        async with asyncio.timeout(10):
            while self.backend.load().running or self.backend.load().waiting:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def site(path: Path):
    device = PixelDevice()
    engine = Engine(make_scheduler(), device)
    engine.start()
    backend = ImageBackend(engine, card("painter", kind="image", aliases=(), image=limits()))
    server = ChannelServer(backend, {}, secret=SECRET, replica_id="replica-0")
    client = await ChannelClient.connect(await server.start(f"unix:{path}/r"), secret=SECRET, gateway_id="gateway-0")
    try:
        async with fake_gateway(client) as gateway:
            yield Site(gateway, backend, device)
    finally:
        device.gate.set()
        await server.aclose()
        await backend.aclose()


def run(path: Path, scenario) -> None:
    async def within():
        async with site(path) as made:
            await scenario(made)

    asyncio.run(asyncio.wait_for(within(), 60))


def opened(entry) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def test_requests_of_every_sort_share_the_engine_and_keep_their_own(tmp_path):
    sorts = [
        {"size": "16x16", "seed": 1, "n": 2}, {"size": "8x24", "num_inference_steps": 9, "output_format": "jpeg"},
        {"size": "16x16", "seed": 2, "scheduler": "ddim"}, {"seed": 1, "guidance_scale": 4, "negative_prompt": "x"},
        {"output_format": "webp", "output_compression": 50}, {"size": "16x16", "seed": 2, "num_inference_steps": 1},
    ]  # fmt: skip

    async def scenario(made):
        replies = await asyncio.gather(*(made.ask(**sort) for sort in sorts))
        for sort, reply in zip(sorts, replies, strict=True):
            answer = reply.json()
            assert reply.status == 200, answer
            assert len(answer["data"]) == sort.get("n", 1)
            for image in map(opened, answer["data"]):
                assert f"{image.width}x{image.height}" == answer["size"] == sort.get("size", "16x16")
                assert image.format.lower() == answer["output_format"] == sort.get("output_format", "png")
            assert answer["usage"]["input_tokens"] == len("a red circle") and answer["usage"]["output_tokens"] > 0
            told = {name: answer[name] for name in ("size", "seed", "num_inference_steps", "scheduler")}
            again = (await made.ask(**{**sort, **told})).json()
            assert again["data"] == answer["data"], "the told values give the same files"
        await made.idle()

    run(tmp_path, scenario)


def test_stream_shows_every_step_and_preview_of_each_image(tmp_path):
    async def scenario(made):
        reply = await made.ask(stream=True, n=2, partial_images=2, stream_progress=True, num_inference_steps=6, seed=4)
        whole = (await made.ask(n=2, num_inference_steps=6, seed=4)).json()["data"]
        for index in range(2):
            own = [event for event in reply.chunks() if event["index"] == index]
            kinds = [event["type"].removeprefix("image_generation.") for event in own]
            assert kinds[-1] == "completed" and kinds.count("completed") == 1
            shown = [event for event in own if "partial_image_index" in event]
            assert [event["partial_image_index"] for event in shown] == [0, 1]
            assert len({event["b64_json"] for event in (*shown, own[-1])}) == 3
            steps = [event["step"] for event in own if event["type"].endswith("progress")]
            assert steps == sorted(set(steps)) and steps[-1] == 6
            assert own[-1]["b64_json"] == whole[index]["b64_json"] and own[-1]["seed"] == 4 + index

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"size": "15x16"}, "size", "multiple of 2"),
        ({"width": 15, "height": 16}, "width", "multiple of 2"),
        ({"size": "128x64"}, "size", "4096"),
        ({"width": 128, "height": 64}, "width", "4096"),
        ({"num_inference_steps": 51}, "num_inference_steps", "50"),
        ({"scheduler": "euler_b"}, "scheduler", "ddim"),
        ({"negative_prompt": "a square"}, "negative_prompt", "guidance_scale"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_the_model_cannot_do_is_400_in_the_words_of_the_request(tmp_path, fields, param, says, is_stream):
    async def scenario(made):
        reply = await made.ask(**fields, n=3, stream=is_stream)
        error = reply.json()["error"]
        assert reply.status == 400 and error["param"] == param and says in error["message"]
        await made.idle()

    run(tmp_path, scenario)


@pytest.mark.parametrize("is_stream", [False, True])
def test_client_that_leaves_frees_the_engine_within_a_step(tmp_path, is_stream):
    async def scenario(made):
        made.device.gate.clear()
        client = Client(made.gateway.app)
        sent = {"prompt": "x", "num_inference_steps": 50, "stream": is_stream}
        asking = asyncio.create_task(client.request("POST", PATH, sent))
        async with asyncio.timeout(10):
            while not (made.device.batches and made.gateway.pool._members["replica-0"].open):
                await asyncio.sleep(0.01)
        client.left.set()
        await asking
        async with asyncio.timeout(10):
            while made.backend._engine._inbox.empty():  # until the cancellation is there; the running step is held
                await asyncio.sleep(0.01)
        num_batches = len(made.device.batches)
        made.device.gate.set()
        await made.idle()
        assert len(made.device.batches) <= num_batches + 1
        assert made.gateway.metric("tandem_images_total", model="painter", outcome="cancelled") == 1

    run(tmp_path, scenario)


def test_deadline_ends_an_image_with_504(tmp_path):
    async def scenario(made):
        made.device.gate.clear()
        asking = asyncio.create_task(made.ask(timeout=0.2))
        async with asyncio.timeout(10):
            while not made.device.batches:  # the request has arrived, so its time runs
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        made.device.gate.set()
        reply = await asking
        assert reply.status == 504 and reply.json()["error"]["code"] == "deadline_exceeded"
        await made.idle()

    run(tmp_path, scenario)
