"""A server for the playground: streams answers and pictures in OpenAI's formats, without a gateway or a model.

The pictures are drawn from the prompt's colours and shape, and the previews are the same ones below noise, so that
screenshots look like what a diffusion model sends.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from PIL import Image, ImageColor, ImageDraw
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.gateway.pages import html_page
from serve.playground import page

SHORT = "The sum of **47** and `38` is 85.\n\n```python\nprint(47 + 38)  # <b>85</b>\n```\n\nDone."
TEXT_MODELS = [
    {"id": "tandem-text", "object": "model", "kind": "text", "max_model_len": 2048},
    {"id": "other-text", "object": "model", "kind": "text", "max_model_len": 32768},
]
LIMITS = {
    "width": 64, "height": 64, "num_inference_steps": 12, "guidance_scale": 4.5, "size_multiple": 16,
    "max_pixels": 128 * 128, "max_steps": 100, "solvers": ["euler", "heun"], "sizes": [], "has_guidance": True,
}  # fmt: skip
CLASS_LIMITS = {
    **LIMITS, "width": 256, "height": 256, "max_pixels": 256 * 256, "sizes": [[256, 256]], "has_guidance": False,
}  # fmt: skip
IMAGE_MODELS = [
    {"id": "tandem-image", "object": "model", "kind": "image", "image": LIMITS},
    {"id": "class-image", "object": "model", "kind": "image", "image": CLASS_LIMITS},
]


@dataclass
class FakeServer:
    """Streams `answer` word by word, then `ending`; remembers what it was asked and who left."""

    answer: str = SHORT
    ending: str = "stop"  # or "endless", "error", "cut"
    key: str | None = None
    refusal: tuple[int, dict[str, Any]] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    pause_after: int | None = None
    """Words before the stream waits for `resume`."""
    resume: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    served: list[dict[str, Any]] = field(default_factory=lambda: [*TEXT_MODELS, *IMAGE_MODELS])
    step_s: float = 0.005
    steps_before_pause: int | None = None
    """Denoise steps before the pictures wait for `resume`."""

    def app(self) -> Starlette:
        routes = [
            Route("/", self.index),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/images/generations", self.images, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def index(self, request: Request) -> Response:
        return html_page(page.render())

    async def models(self, request: Request) -> Response:
        if (refusal := self.refused(request)) is not None:
            return refusal
        return JSONResponse({"object": "list", "data": self.served})

    async def chat(self, request: Request) -> Response:
        return await self.answer_with(request, lambda body: self.stream())

    async def images(self, request: Request) -> Response:
        return await self.answer_with(request, self.pictures)

    async def answer_with(self, request: Request, stream: Callable[[dict[str, Any]], AsyncIterator[str]]) -> Response:
        if (refusal := self.refused(request)) is not None:
            return refusal
        body = json.loads(await request.body())
        self.bodies.append(body)
        if self.refusal is not None:
            return JSONResponse({"error": self.refusal[1]}, status_code=self.refusal[0])
        return StreamingResponse(stream(body), media_type="text/event-stream")

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "this server needs an API key", "code": "invalid_api_key"}}, 401)

    async def stream(self) -> AsyncIterator[str]:
        def event(choices: list[Any], **more: Any) -> str:
            return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

        words = self.answer.split(" ")
        try:
            yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            yield ": still working\n\n"
            for index, word in enumerate(words):
                await asyncio.sleep(0.002)  # a model's pace
                while index == self.pause_after and not self.resume.is_set():
                    await asyncio.sleep(0.01)
                yield event([{"index": 0, "delta": {"content": f" {word}" if index else word}}])
            while self.ending == "endless":
                await asyncio.sleep(0.01)
                yield event([{"index": 0, "delta": {"content": " on"}}])
            if self.ending == "error":
                yield event(
                    [], error={"message": "the replica was lost", "type": "server_error", "code": "replica_lost"}
                )
                return
            if self.ending == "cut":
                return
            yield event([{"index": 0, "delta": {}, "finish_reason": self.ending}])
            usage = {"prompt_tokens": 23, "completion_tokens": 42, "prompt_tokens_details": {"cached_tokens": 16}}
            yield event([], usage=usage)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def pictures(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """All pictures of a request step by step, as one batch would make them."""

        def event(kind: str, index: int, **fields: Any) -> str:
            name = f"image_generation.{kind}"
            return f"event: {name}\ndata: {json.dumps({'type': name, 'index': index, **fields})}\n\n"

        num_steps = body.get("num_inference_steps", LIMITS["num_inference_steps"])
        num_previews, size = body["partial_images"], body["size"]
        shown = {"size": size, "output_format": body.get("output_format", "png")}
        due = {round(num_steps * (number + 1) / (num_previews + 1)): number for number in range(num_previews)}
        try:
            yield ": still working\n\n"
            for step in range(1, num_steps + 1):
                await asyncio.sleep(self.step_s)
                while step == self.steps_before_pause and not self.resume.is_set():
                    await asyncio.sleep(0.01)
                for index in range(body["n"]):
                    yield event("progress", index, step=step, num_steps=num_steps)
                    if step in due:
                        data = picture(body, index, noise=1 - step / num_steps)
                        yield event("partial_image", index, b64_json=data, partial_image_index=due[step], **shown)
                if self.ending == "error" and step == num_steps // 2:
                    error = {"message": "the replica was lost", "type": "server_error", "code": "replica_lost"}
                    yield f"data: {json.dumps({'error': error})}\n\n"
                    return
                if self.ending == "cut" and step == num_steps // 2:
                    return
            while self.ending == "endless":
                await asyncio.sleep(0.01)
                yield ": still working\n\n"
            used = {
                "num_inference_steps": num_steps, "guidance_scale": body.get("guidance_scale", 4.5),
                "scheduler": body.get("scheduler", "euler"), "usage": {"total_tokens": 70},
            }  # fmt: skip
            for index in range(body["n"]):
                yield event(
                    "completed", index, b64_json=picture(body, index), seed=body["seed"] + index, **shown, **used
                )
        except asyncio.CancelledError:
            self.left.set()
            raise


def picture(body: dict[str, Any], index: int, noise: float = 0.0) -> str:
    """Base64 of a shape on a plain ground as the prompt says; drawn large and made smaller, so edges are smooth."""
    words = re.findall(r"\w+", body["prompt"])
    colours = [word for word in words if word in ImageColor.colormap] or ["teal", "white"]
    rng = random.Random(f"{body['prompt']} {body['seed'] + index}")
    width, height = (int(side) for side in body["size"].split("x"))
    drawn = Image.new("RGB", (4 * width, 4 * height), colours[-1])
    side = min(width, height)
    radius = 4 * side * (0.4 if "large" in words else 0.18 if "small" in words else rng.uniform(0.25, 0.32))
    x = 4 * width * (0.5 + 0.22 * (("right" in words) - ("left" in words)) + rng.uniform(-0.05, 0.05))
    y = 4 * height * (0.5 + 0.22 * (("bottom" in words) - ("top" in words)) + rng.uniform(-0.05, 0.05))
    pen = ImageDraw.Draw(drawn)
    if "triangle" in words:
        pen.regular_polygon((x, y, radius), 3, fill=colours[0])
    elif "square" in words:
        pen.regular_polygon((x, y, radius), 4, fill=colours[0])
    elif "star" in words:
        pen.regular_polygon((x, y, radius), 5, fill=colours[0])
    else:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colours[0])
    drawn = drawn.resize((width, height), Image.Resampling.LANCZOS)
    if noise:
        drawn = Image.blend(drawn, Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height)), noise)
    file = io.BytesIO()
    drawn.save(file, format=body.get("output_format", "png"))
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def running_server() -> Iterator[FakeServer]:
    """The server on a port of its own."""
    fake = FakeServer()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield fake
    server.should_exit = True
    thread.join(10)
