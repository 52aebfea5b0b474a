"""One image request ↔ its trajectories and their events, over an engine in this process.

A request for `n` images is `n` trajectories with seeds `seed + i`; they share forwards as any others do. Pixels become
files in a thread, so neither the step loop nor the event loop waits for a PNG. Closing the stream cancels them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

from serve.backend import EventStream, Load
from serve.engine.engine import Engine
from serve.engine.stream import Stream
from serve.errors import InvalidRequest
from serve.events import DenoiseProgress, Event, Finished, FinishReason, ImagePreview, ImageReady, Usage
from serve.image.media import FORMATS, encode_image
from serve.image.trajectory import Trajectory, TrajectoryUpdate
from serve.merged import merge
from serve.ranks.group import RankGroup
from serve.request import ImageRequest, ModelCard, Request


class ImageBackend:
    """A `Backend` over an engine of trajectories. It owns the engine and other ranks: `aclose()` ends them."""

    def __init__(
        self,
        engine: Engine[Trajectory, Any, Any],
        card: ModelCard,
        *,
        has_previews: bool = True,
        ranks: RankGroup | None = None,
    ):
        """`has_previews`: whether the model shows estimates on the way; without them none are sent."""
        self._engine = engine
        self._card = card
        self._has_previews = has_previews
        self._ranks = ranks
        self._serial = itertools.count()
        self._untold: set[ImageStream] = set()
        """Streams whose end has not been read yet: a finished image may still be on its way into a file."""
        self._all_told = asyncio.Event()

    @property
    def card(self) -> ModelCard:
        return self._card

    async def submit(self, request: Request) -> EventStream:
        """All images or none: if one is refused, those accepted before it are cancelled."""
        if not isinstance(request, ImageRequest):
            raise InvalidRequest(f"{self._card.name} is an image model; ask a text model for text", param="model")
        _check(request)
        images: list[ImageStream] = []
        try:
            for index in sorted(set(range(request.n)) - set(request.delivered)):
                stream = self._engine.submit(self._trajectory(request, index))
                images.append(ImageStream(index, request, stream, self._told))
        except BaseException:
            for image in images:
                await image.aclose()
            raise
        self._untold.update(images)
        return merge(images)

    def load(self) -> Load:
        return self._engine.load()

    async def check_health(self) -> None:
        self._engine.check_health()

    async def drain(self, timeout_s: float) -> None:
        began = time.monotonic()
        await self._engine.drain(timeout_s)
        if self._untold:
            self._all_told.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_told.wait(), max(0.0, timeout_s - (time.monotonic() - began)))

    async def aclose(self) -> None:
        await asyncio.to_thread(self._engine.close)  # it waits for the step that is running
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.close)

    def _told(self, stream: ImageStream) -> None:
        self._untold.discard(stream)
        if not self._untold:
            self._all_told.set()

    def _trajectory(self, request: ImageRequest, index: int) -> Trajectory:
        """The serial number makes the id unique: two requests may well come with the same id."""
        return Trajectory(
            id=f"{request.request_id}/{next(self._serial)}",
            priority=request.priority,
            timeout_s=request.timeout_s,
            traceparent=request.traceparent,
            tracestate=request.tracestate,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            solver=request.solver,
            seed=request.seed + index,
            num_previews=request.num_previews if self._has_previews else 0,
        )


class ImageStream:
    """An `EventStream`: what one trajectory's updates mean to the caller."""

    def __init__(
        self,
        index: int,
        request: ImageRequest,
        stream: Stream[Trajectory],
        on_end: Callable[[ImageStream], None],
    ):
        """`on_end` is told that the last event was read, or that none will be."""
        self._index = index
        self._request = request
        self._stream = stream
        self._on_end = on_end
        self._num_previews = 0
        self._has_ended = False
        self._is_closed = False

    def __aiter__(self) -> ImageStream:
        return self

    async def __anext__(self) -> list[Event]:
        if self._has_ended:
            raise StopAsyncIteration
        events: list[Event] = []
        try:
            updates: list[TrajectoryUpdate] = await anext(self._stream, [])
            if updates and not self._is_closed:
                events = await self._events(updates)
        finally:
            if self._has_ended or not events:
                self._on_end(self)
        if self._is_closed or not events:
            raise StopAsyncIteration
        return events

    async def aclose(self) -> None:
        self._is_closed = True
        self._on_end(self)
        await self._stream.aclose()

    async def _events(self, updates: list[TrajectoryUpdate]) -> list[Event]:
        """Everything since the last read: each preview, the latest progress, and the image when it is finished."""
        num_steps = self._stream.job.num_steps
        events: list[Event] = []
        for update in updates:
            if update.pixels is not None and update.step < num_steps:
                data = await self._encoded(update.pixels)
                events.append(ImagePreview(self._index, self._num_previews, update.step, data))
                self._num_previews += 1
        steps = [update.step for update in updates if update.pixels is None]
        if steps:
            events.append(DenoiseProgress(self._index, steps[-1], num_steps))
        last = updates[-1]
        if last.pixels is not None and last.step == num_steps:
            events.append(ImageReady(self._index, await self._encoded(last.pixels)))
            usage = Usage(self._stream.job.num_prompt_tokens, self._stream.job.num_tokens)
            events.append(Finished(self._index, FinishReason.STOP, usage))
            self._has_ended = True
        return events

    async def _encoded(self, pixels: bytes) -> bytes:
        request = self._request
        return await asyncio.to_thread(
            encode_image, pixels, request.width, request.height, request.output_format, request.output_compression
        )


_MOST_WEBP = 16383
"""Pixels of a side, by the format's definition."""


def _check(request: ImageRequest) -> None:
    """What is not the trajectories' business."""
    if request.n < 1:
        raise InvalidRequest(f"n is {request.n}; ask for at least one image", param="n")
    if set(request.delivered) >= set(range(request.n)):
        raise InvalidRequest(f"all of the {request.n} images are delivered already", param="delivered")
    if request.output_format not in FORMATS:
        raise InvalidRequest(
            f"output_format {request.output_format!r} is not one of {', '.join(FORMATS)}", param="output_format"
        )
    if request.output_format == "webp" and max(request.width, request.height) > _MOST_WEBP:
        raise InvalidRequest(
            f"output_format is 'webp', whose sides end at {_MOST_WEBP} pixels; use png", param="output_format"
        )
    if not 0 <= request.output_compression <= 100:
        raise InvalidRequest(
            f"output_compression is {request.output_compression}; give a value from 0 to 100",
            param="output_compression",
        )
