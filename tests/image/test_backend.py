"""A request in, events out: images, progress, previews, all or none refused, closing, failing, draining."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from fake_backend import card
from fake_dit import FakeDiT
from image_engine import make_engine
from PIL import Image

from serve.errors import DeadlineExceeded, Draining, InvalidRequest, Overloaded, RequestFailed
from serve.events import DenoiseProgress, Event, Finished, FinishReason, ImagePreview, ImageReady, Usage
from serve.image import backend as backend_module
from serve.image.backend import ImageBackend
from serve.request import ImageRequest, SamplingParams, TextRequest


class Setup:
    """A backend over a tiny model; `read` steps the engine until a stream has ended."""

    def __init__(self, **settings: Any):
        self.model = FakeDiT()
        self.engine, self.runner = make_engine(self.model, **settings)
        self.model.calls.clear()
        self.backend = ImageBackend(self.engine, card())

    async def step(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.engine.step()
            for _ in range(5):
                await asyncio.sleep(0)  # readers run

    async def read(self, stream: Any) -> list[Event]:
        events: list[Event] = []

        async def reader() -> None:
            async for more in stream:
                assert more, "a read without events"
                events.extend(more)

        task = asyncio.ensure_future(reader())
        while not task.done():
            await self.step()
            await asyncio.sleep(0.0005 if self.is_idle else 0)  # files are written in threads
        await task
        return events

    @property
    def is_idle(self) -> bool:
        load = self.backend.load()
        return load.running == load.waiting == 0 and not self.runner._tensors


def request(**values: Any) -> ImageRequest:
    defaults: dict[str, Any] = {
        "request_id": "r", "model": "fake", "prompt": "two words", "width": 16, "height": 16,
        "num_inference_steps": 6, "guidance_scale": 4.0, "solver": "flow_match_euler", "seed": 5,
    }  # fmt: skip
    return ImageRequest(**defaults | values)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def images_of(events: list[Event]) -> dict[int, np.ndarray]:
    return {event.index: opened(event.data) for event in events if isinstance(event, ImageReady)}


def test_images_that_another_replica_has_delivered_are_not_drawn_again():
    async def test() -> None:
        setup = Setup()
        everything = images_of(await setup.read(await setup.backend.submit(request(n=3))))
        events = await setup.read(await setup.backend.submit(request(n=3, delivered=(1,))))
        rest = images_of(events)
        assert rest.keys() == {0, 2} and {event.index for event in events} == {0, 2}
        assert all(np.array_equal(rest[index], everything[index]) for index in rest)
        with pytest.raises(InvalidRequest, match="delivered"):
            await setup.backend.submit(request(n=2, delivered=(0, 1)))

    run(test)


def test_one_image_gives_its_progress_previews_file_and_one_finish_with_usage():
    async def test():
        setup = Setup()
        events = await setup.read(await setup.backend.submit(request(num_previews=2)))
        steps = [event.step for event in events if isinstance(event, DenoiseProgress)]
        assert steps == sorted(set(steps)) and steps[-1] == 6
        previews = [event for event in events if isinstance(event, ImagePreview)]
        assert [(event.number, event.step) for event in previews] == [(0, 2), (1, 4)]
        assert opened(previews[0].data).shape == (16, 16, 3)
        assert isinstance(events[-2], ImageReady) and opened(events[-2].data).shape == (16, 16, 3)
        assert events[-1] == Finished(0, FinishReason.STOP, Usage(2, 16))
        assert setup.is_idle

    run(test)


def test_a_reader_that_keeps_up_sees_every_step():
    async def test():
        setup = Setup()
        events = await setup.read(await setup.backend.submit(request()))
        assert [event.step for event in events if isinstance(event, DenoiseProgress)] == [1, 2, 3, 4, 5, 6]

    run(test)


def test_n_images_are_those_of_the_next_seeds_and_share_forwards():
    async def test():
        setup = Setup()
        events = await setup.read(await setup.backend.submit(request(n=3)))
        images = images_of(events)
        assert set(images) == {0, 1, 2}
        assert setup.model.calls == [6] * 6
        assert sorted(event.index for event in events if isinstance(event, Finished)) == [0, 1, 2]
        for index in range(3):
            (alone,) = images_of(await setup.read(await setup.backend.submit(request(seed=5 + index)))).values()
            assert np.abs(images[index] - alone).max() <= 1

    run(test)


def test_a_slow_reader_gets_every_preview_and_only_the_latest_progress():
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request(num_previews=2))
        while setup.engine.step():
            pass
        events = await anext(stream)
        kinds = [type(event) for event in events]
        assert kinds == [ImagePreview, ImagePreview, DenoiseProgress, ImageReady, Finished]
        assert events[2] == DenoiseProgress(0, 6, 6)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(test)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_file_is_of_the_format_asked_for(output_format):
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request(output_format=output_format, output_compression=80))
        (file,) = [event.data for event in await setup.read(stream) if isinstance(event, ImageReady)]
        assert Image.open(io.BytesIO(file)).format == output_format.upper()

    run(test)


def test_files_are_written_in_a_thread_while_steps_go_on(monkeypatch):
    is_writing, may_end = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> bytes:
        assert threading.current_thread() is not threading.main_thread()
        is_writing.set()
        assert may_end.wait(30)
        return b"file"

    monkeypatch.setattr(backend_module, "encode_image", slow)

    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request(num_previews=1))
        reading = asyncio.ensure_future(setup.read(stream))
        while not is_writing.is_set():
            await asyncio.sleep(0.001)
        num_forwards = len(setup.model.calls)
        while len(setup.model.calls) < 6:
            await asyncio.sleep(0.001)
        assert num_forwards < 6, "the other steps were computed while the preview was written"
        may_end.set()
        await reading

    run(test)


def test_closing_cancels_every_image_after_at_most_one_more_step():
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request(n=2, num_inference_steps=40))
        await setup.step(6)
        num_forwards = len(setup.model.calls)
        await stream.aclose()
        while setup.engine.step():
            pass
        assert len(setup.model.calls) <= num_forwards + 1 and setup.is_idle
        assert await anext(stream, None) is None

    run(test)


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"n": 0}, "n"),
        ({"width": 18}, "width"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"num_inference_steps": 10**12}, "num_inference_steps"),
        ({"solver": "heun"}, "scheduler"),
        ({"prompt": "unknown"}, "prompt"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"seed": 2**64 - 1, "n": 2}, "seed"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(values, param):
    async def test():
        setup = Setup()
        with pytest.raises(InvalidRequest) as refusal:
            await setup.backend.submit(request(**values))
        assert refusal.value.param == param
        while setup.engine.step():
            pass
        assert setup.is_idle

    run(test)


def test_a_text_request_is_refused():
    async def test():
        text = TextRequest(request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1))
        with pytest.raises(InvalidRequest, match="is an image model"):
            await Setup().backend.submit(text)

    run(test)


def test_a_full_queue_refuses_all_images_of_a_request():
    async def test():
        setup = Setup()
        setup.engine._door._max_waiting = 3
        with pytest.raises(Overloaded):
            await setup.backend.submit(request(n=5))
        while setup.engine.step():
            pass
        assert setup.is_idle

    run(test)


def test_one_failing_image_ends_the_request_with_its_error():
    async def test():
        logging.disable(logging.CRITICAL)
        setup = Setup()
        stream = await setup.backend.submit(request(prompt="nan", n=2))
        with pytest.raises(RequestFailed):
            await setup.read(stream)
        logging.disable(logging.NOTSET)
        while setup.engine.step():
            pass
        assert setup.is_idle

    run(test)


def test_a_deadline_reaches_the_reader():
    async def test():
        now = iter(range(1000))
        setup = Setup(clock=lambda: float(next(now)))  # every look at the clock is a second later
        stream = await setup.backend.submit(request(timeout_s=20.0, num_inference_steps=50))
        with pytest.raises(DeadlineExceeded):
            await setup.read(stream)

    run(test)


def test_draining_waits_until_the_last_file_is_written(monkeypatch):
    may_end = threading.Event()

    def slow(*arguments: Any) -> bytes:
        assert may_end.wait(30)
        return b"file"

    monkeypatch.setattr(backend_module, "encode_image", slow)

    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request())
        setup.engine.start()
        events: list[Event] = []

        async def reader() -> None:
            async for more in stream:
                events.extend(more)

        reading = asyncio.ensure_future(reader())
        draining = asyncio.ensure_future(setup.backend.drain(30))
        while not setup.is_idle:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert not draining.done()
        may_end.set()
        await draining
        await reading
        assert isinstance(events[-1], Finished)
        with pytest.raises(Draining):
            await setup.backend.submit(request())
        await setup.backend.aclose()

    run(test)
