"""Who makes images in a benchmark: our engine stepped by hand, and the stock diffusers pipeline. Both do the same work.

Each makes pictures from a list of asks and counts its transformer's forwards in a `StepMeter`. Noise comes from each
ask's own seed on the CPU, so the same ask is the same picture whoever makes it, up to rounding.
"""

from __future__ import annotations

import inspect
import itertools
import json
import random
import time
from collections import deque
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from models.source import resolve
from serve.engine.interface import StepStats
from serve.engine.job import Job
from serve.engine.stream import Stream
from serve.image.build import build_engine
from serve.image.trajectory import Trajectory
from serve.options import ModelOptions
from serve.request import ImageLimits, ModelCard

NO_DIFFUSERS = "images were not measured: diffusers is not installed, and image models are made of its parts"

Picture = bytes
"""RGB, a byte each, row by row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One image to make, at the model's own size."""

    prompt: str
    num_steps: int
    guidance_scale: float
    solver: str
    seed: int


@dataclass(slots=True)
class StepMeter:
    """Counts denoise steps: forwards of the transformer, their rows, and how long one takes with its solver."""

    num_forwards: int = 0
    num_rows: int = 0
    times_s: list[float] = field(default_factory=list)

    def reset(self) -> None:
        self.num_forwards = self.num_rows = 0
        self.times_s.clear()

    @property
    def mean_rows(self) -> float:
        return self.num_rows / max(1, self.num_forwards)


def diffusers_version() -> str | None:
    """None where it is not installed: then there is no image model, and nothing of this can run."""
    try:
        return version("diffusers")
    except PackageNotFoundError:
        return None


class EnginePeer:
    """The image engine, its model and its options."""

    name = "tandem-image-engine"

    def __init__(self, options: ModelOptions, *, depth: int | None = None):
        """Loads the model. Raises ConfigError."""
        self.meter = StepMeter()
        self._engine, self.card, _ = build_engine(options, observer=_Observer(self.meter), depth=depth)
        folder = resolve(options.model, load_format=options.load_format)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        self.takes_classes = index["_class_name"] == "DiTPipeline"
        """Whether a prompt is the number of a class."""
        self._numbers = itertools.count()

    @property
    def limits(self) -> ImageLimits:
        assert self.card.image is not None
        return self.card.image

    def make(self, asks: list[Ask], at_a_time: int, *, arrivals: random.Random | None = None) -> list[Picture]:
        """All pictures, in order. `arrivals`: whether a newcomer takes a free place now or at a later step is left to
        chance, so that requests join at any time; None: at once."""
        waiting, streams = deque(asks), []
        while True:
            self._engine.check_health()
            load = self._engine.load()
            free = at_a_time - load.running - load.waiting
            while waiting and free and (arrivals is None or arrivals.random() < 0.5):
                streams.append(self._engine.submit(self._trajectory(waiting.popleft())))
                free -= 1
            if not self._engine.step() and not waiting:
                return [_picture(stream) for stream in streams]

    def _trajectory(self, ask: Ask) -> Trajectory:
        return Trajectory(
            id=f"image-{next(self._numbers)}",
            prompt=ask.prompt,
            width=self.limits.width,
            height=self.limits.height,
            num_steps=ask.num_steps,
            guidance_scale=ask.guidance_scale,
            solver=ask.solver,
            seed=ask.seed,
        )


class StockPeer:
    """The diffusers pipeline of the same folder, called as anybody would: all images of a call go in step."""

    def __init__(self, options: ModelOptions, card: ModelCard):
        """Loads the same weights again, on the device and in the dtype of `card`. Needs diffusers."""
        from models.dit.checkpoint import load_pipeline, read_index, read_json

        folder = resolve(options.model, load_format=options.load_format)
        self._pipeline = load_pipeline(
            read_index(folder),
            device=torch.device(card.device),
            dtype=getattr(torch, card.dtype),
            load_format=options.load_format,
        )
        assert card.image is not None
        self.meter = StepMeter()
        parameters = inspect.signature(self._pipeline.__call__).parameters
        own = read_json(folder / "tandem.json") if (folder / "tandem.json").is_file() else {}
        offered = {
            "width": card.image.width,
            "height": card.image.height,
            "max_sequence_length": own.get("max_sequence_length"),
        }
        self._takes_classes = "class_labels" in parameters
        self._arguments = {name: value for name, value in offered.items() if name in parameters and value}
        denoiser = getattr(self._pipeline, "transformer", None) or self._pipeline.unet
        denoiser.register_forward_pre_hook(self._begin_forward, with_kwargs=True)
        self._begun: float | None = None

    def make(self, asks: list[Ask], at_a_time: int) -> list[Picture]:
        """So many in one call, then the next. Steps and guidance are those of the call's first."""
        batches = [asks[start : start + at_a_time] for start in range(0, len(asks), at_a_time)]
        return [picture for batch in batches for picture in self._call(batch)]

    def _call(self, asks: list[Ask]) -> list[Picture]:
        self._begun = None
        prompts = [ask.prompt for ask in asks]
        images = self._pipeline(
            **{"class_labels": [int(prompt) for prompt in prompts]} if self._takes_classes else {"prompt": prompts},
            **self._arguments,
            num_inference_steps=asks[0].num_steps,
            guidance_scale=asks[0].guidance_scale,
            generator=[torch.Generator().manual_seed(ask.seed) for ask in asks],
            output_type="np",
        ).images
        return [(image * 255).round().astype("uint8").tobytes() for image in images]

    def _begin_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step is from one forward to the next: the last of a call, with the decoding behind it, is not timed."""
        now = time.perf_counter()
        if self._begun is not None:
            self.meter.times_s.append(now - self._begun)
        self._begun = now
        self.meter.num_forwards += 1
        self.meter.num_rows += len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


class _Observer:
    """Tells a meter of an engine's denoise steps."""

    def __init__(self, meter: StepMeter):
        self._meter = meter

    def on_step(self, stats: StepStats) -> None:
        if stats.stage == "denoise":
            self._meter.num_forwards += 1
            self._meter.num_rows += stats.num_rows
            self._meter.times_s.append(stats.duration_s)

    def on_finish(self, job: Job) -> None: ...

    def on_canary(self, duration_s: float) -> None: ...


def _picture(stream: Stream[Trajectory]) -> Picture:
    last = stream.take()[-1].pixels
    assert last is not None, f"{stream.job_id} ended without a picture"
    picture: bytes = last
    return picture


def largest_difference(ours: list[Picture], theirs: list[Picture]) -> int:
    """Between two sets of pictures, in levels of 255."""
    pairs = [(_levels(a), _levels(b)) for a, b in zip(ours, theirs, strict=True)]
    return max(int((a - b).abs().max()) for a, b in pairs)


def _levels(picture: Picture) -> torch.Tensor:
    return torch.frombuffer(bytearray(picture), dtype=torch.uint8).int()
