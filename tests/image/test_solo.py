"""The fallback: stock pipelines one image at a time, one denoise step per engine step, neighbours undisturbed."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch
from fake_dit import FakeDiT
from fakes import FakeClock
from image_device import limits
from image_engine import ImageEngine, drain, job, make_engine, pixels

from models.dit.pipeline import PipelineSpec, StockPipeline
from serve.engine.engine import Engine
from serve.engine.interface import DeviceFault
from serve.errors import DeadlineExceeded, RequestFailed
from serve.image.limits import Limits
from serve.image.scheduler import ImageScheduler
from serve.image.solo import SoloRunner

CPU = torch.device("cpu")


class Scheduler:
    timesteps = range(0)


class Pipeline:
    """The least that has a pipeline's shape: a loop of its own, and a callback after every step."""

    visits_per_step = 1

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.steps: list[tuple[str, int]] = []
        """Shared by all copies: which prompt computed which step, in order."""
        self.components: dict[str, Any] = {}

    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 50,
        width: int = 16,
        height: int = 16,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        generator: Any = None,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
    ) -> Any:
        if "poison" in prompt:
            raise RuntimeError("the text encoder breaks")
        image = torch.rand((1, 3, height, width), generator=generator)
        self.num_timesteps = num_inference_steps * self.visits_per_step
        for step in range(self.num_timesteps):
            self.steps.append((prompt, step))
            image = image * 0.9 + 0.01
            callback_on_step_end(self, step, 0, {})
        return type("Output", (), {"images": image})


def make_solo(pipeline: Pipeline, **settings: Any) -> tuple[ImageEngine, SoloRunner]:
    spec = PipelineSpec(
        dtype=torch.float32, width=16, height=16, num_inference_steps=50, guidance_scale=1.0, size_multiple=8,
        max_pixels=64 * 64, solvers=("EulerDiscreteScheduler",),
    )  # fmt: skip
    runner = SoloRunner(StockPipeline(pipeline, spec), CPU)
    scheduler = ImageScheduler(
        Limits(limits(solvers=spec.solvers), lambda prompt: None, lambda solver, num_steps: None),
        lambda width, height: 1,
        max_num_images=1,
        max_num_batched_tokens=100,
    )
    return Engine(scheduler, runner, **settings), runner


def ask(name: str, **values: Any) -> Any:
    return job(name, **{"solver": "EulerDiscreteScheduler", "prompt": name, "guidance_scale": 1.0, **values})


def pipeline_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pipeline"]


def test_each_engine_step_is_one_denoise_step_and_brings_progress():
    pipeline = Pipeline()
    engine, _ = make_solo(pipeline)
    stream = engine.submit(ask("a", num_steps=7))
    engine.step()
    for step in range(1, 8):
        engine.step()
        assert len(pipeline.steps) == step
        assert [update.step for update in stream.take()] == [step]
    engine.step()
    (picture,) = pixels(stream)
    assert picture.shape == (16, 16, 3) and stream.finish_reason == "stop"
    assert pipeline_threads() == []


def test_the_image_is_the_pipelines_own_for_this_seed():
    engine, _ = make_solo(Pipeline())
    stream = engine.submit(ask("a", num_steps=5, seed=3))
    drain(engine)
    generator = torch.Generator().manual_seed(3)
    (expected,) = Pipeline()("a", 5, generator=generator, callback_on_step_end=lambda *_: {}).images
    assert np.abs(pixels(stream)[0] - expected.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_a_solver_that_visits_times_twice_is_shared_out_over_the_steps_asked_for():
    pipeline = Pipeline()
    pipeline.visits_per_step = 2
    engine, _ = make_solo(pipeline)
    stream = engine.submit(ask("a", num_steps=5))
    drain(engine)
    shown = stream.take()
    assert [update.step for update in shown if update.pixels is None] == [1, 2, 3, 4, 5]
    assert len(pipeline.steps) == 10 and shown[-1].pixels is not None


def test_images_are_made_one_after_the_other():
    pipeline = Pipeline()
    engine, _ = make_solo(pipeline)
    streams = [engine.submit(ask(name, num_steps=4)) for name in ("a", "b", "c")]
    drain(engine)
    assert [prompt for prompt, _ in pipeline.steps] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert all(stream.finish_reason == "stop" for stream in streams)


def test_a_cancel_ends_the_running_image_within_a_step_and_the_next_begins():
    pipeline = Pipeline()
    engine, runner = make_solo(pipeline)
    first, second = engine.submit(ask("first", num_steps=50)), engine.submit(ask("second", num_steps=2))
    for _ in range(10):
        engine.step()
    num_steps = len(pipeline.steps)
    first.cancel()
    drain(engine)
    assert [prompt for prompt, _ in pipeline.steps[num_steps:]] == ["second"] * 2
    assert second.finish_reason == "stop" and not runner._runs and pipeline_threads() == []


def test_the_queue_keeps_its_deadlines_and_cancels_while_an_image_is_made():
    clock = FakeClock()
    engine, _ = make_solo(Pipeline(), clock=clock)
    running = engine.submit(ask("running", num_steps=50))
    late = engine.submit(ask("late", timeout_s=5.0))
    gone = engine.submit(ask("gone"))
    for _ in range(6):
        engine.step()
        clock.advance(1.0)
    gone.cancel()
    engine.step()
    assert gone.finish_reason == "cancelled" and running.finish_reason is None
    with pytest.raises(DeadlineExceeded):
        late.take()
    running.cancel()
    drain(engine)


def test_fifty_steps_of_a_pipeline_do_not_hold_up_batched_images_beside_it():
    """Two engines in threads of their own: what one has finished while the other was somewhere in its fifty steps."""
    pipeline, may_go_on = Pipeline(), threading.Event()
    solo, _ = make_solo(pipeline)
    batched, _ = make_engine(FakeDiT())
    reached = threading.Event()
    append = pipeline.steps.append

    class Steps(list):  # type: ignore[type-arg]
        def append(self, entry: Any) -> None:
            append(entry)
            if entry[1] == 25:
                reached.set()
                assert may_go_on.wait(30)

    pipeline.steps = Steps()
    slow = solo.submit(ask("slow", num_steps=50))
    solo.start()
    assert reached.wait(30)
    batched.start()
    streams = [batched.submit(job(f"{i}", num_steps=3 + i)) for i in range(4)]
    while any(stream.finish_reason is None for stream in streams):
        batched.check_health()
        threading.Event().wait(0.001)
    assert slow.finish_reason is None, "it is still in its 26th step"
    may_go_on.set()
    while slow.finish_reason is None:
        solo.check_health()
        threading.Event().wait(0.001)
    assert all(len(pixels(stream)) == 1 for stream in (slow, *streams))
    solo.close()
    batched.close()


def test_a_pipeline_that_fails_ends_its_own_image_only():
    logging.disable(logging.CRITICAL)
    engine, runner = make_solo(Pipeline())
    culprit, other = engine.submit(ask("poison", num_steps=4)), engine.submit(ask("b", num_steps=4))
    drain(engine)
    logging.disable(logging.NOTSET)
    with pytest.raises(RequestFailed):
        culprit.take()
    assert other.finish_reason == "stop" and not runner._runs and pipeline_threads() == []


def test_closing_the_engine_ends_the_pipelines_thread():
    engine, _ = make_solo(Pipeline())
    engine.submit(ask("a", num_steps=50))
    for _ in range(5):
        engine.step()
    engine.close()
    assert pipeline_threads() == []


def test_the_canary_asks_the_device(monkeypatch):
    _, runner = make_solo(Pipeline())
    runner.check()
    monkeypatch.setattr(torch, "ones", lambda *shape, **values: torch.zeros(shape))
    with pytest.raises(DeviceFault):
        runner.check()
