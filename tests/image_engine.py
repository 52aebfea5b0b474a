"""The image engine over a model, to be stepped by hand, and what its streams show."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from models.dit.base import DiT
from serve.engine.engine import Engine
from serve.engine.stream import Stream
from serve.image.forward_graph import ForwardGraphs
from serve.image.limits import Limits
from serve.image.runner import ImageRunner
from serve.image.scheduler import ImageScheduler
from serve.image.trajectory import ImageBatch, ImageOutput, Trajectory
from serve.request import ImageLimits

ImageEngine = Engine[Trajectory, ImageBatch, ImageOutput]


def make_engine(
    model: DiT,
    *,
    depth: int = 0,
    max_num_images: int = 16,
    cap: int = 1 << 20,
    clock: Callable[[], float] = time.monotonic,
    graphs: ForwardGraphs | None = None,
) -> tuple[ImageEngine, ImageRunner]:
    spec = model.spec
    runner = ImageRunner(model, torch.device("cpu"), graphs)
    runner.warm_up()
    limits = ImageLimits(
        width=spec.width, height=spec.height, num_inference_steps=spec.num_inference_steps, guidance_scale=4.0,
        size_multiple=spec.size_multiple, max_pixels=spec.max_pixels, max_steps=50, solvers=spec.solvers,
        sizes=spec.sizes, max_side=spec.max_side,
    )  # fmt: skip
    scheduler = ImageScheduler(
        Limits(limits, model.check_prompt, runner.check_schedule),
        model.num_tokens,
        max_num_images=max_num_images,
        max_num_batched_tokens=cap,
    )
    return Engine(scheduler, runner, depth=depth, clock=clock), runner


def job(name: str, **values: Any) -> Trajectory:
    defaults: dict[str, Any] = {
        "prompt": f"a picture of {name}", "width": 16, "height": 16, "num_steps": 5, "guidance_scale": 4.0,
        "solver": "flow_match_euler", "seed": 7,
    }  # fmt: skip
    return Trajectory(id=name, **defaults | values)


def pixels(stream: Stream[Trajectory]) -> list[np.ndarray]:
    """Every picture shown, previews first, as floats in 0..1."""
    shown = [update.pixels for update in stream.take() if update.pixels is not None]
    size = (stream.job.height, stream.job.width, 3)
    return [np.frombuffer(data, np.uint8).reshape(size).astype(float) / 255 for data in shown]


def drain(engine: ImageEngine) -> None:
    while engine.step():
        engine.check_health()


def alone(model: DiT, **values: Any) -> list[np.ndarray]:
    engine, _ = make_engine(model)
    stream = engine.submit(job("it", **values))
    drain(engine)
    return pixels(stream)
