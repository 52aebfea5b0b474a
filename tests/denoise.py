"""The least loop that drives a `DiT`, as an engine does. Requests join at their tick and share forwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve.image.solver import Schedule, advance, make_schedule


@dataclass(frozen=True, kw_only=True)
class Ask:
    """An image to make."""

    prompt: str
    seed: int
    steps: int = 5
    guidance: float = 4.0
    solver: str
    negative_prompt: str = ""
    size: tuple[int, int] = (32, 32)
    joins_at: int = 0


@dataclass
class _Image:
    ask: Ask
    schedule: Schedule
    generator: torch.Generator
    latents: Tensor
    conditioning: list[Any]
    step: int = 0


def denoise(model: Any, asks: Sequence[Ask]) -> list[Tensor]:
    """The images (3, P, Q), 0..1, in order."""
    waiting, live, finished = list(asks), list[_Image](), dict[int, Tensor]()
    tick = 0
    while waiting or live:
        joining = [ask for ask in waiting if ask.joins_at <= tick]
        waiting = [ask for ask in waiting if ask.joins_at > tick]
        live += _start(model, joining)
        by_shape = defaultdict(list)
        for image in live:
            by_shape[image.latents.shape].append(image)
        for images in by_shape.values():
            _step(model, images)
        for image in [image for image in live if image.step == image.schedule.num_steps]:
            live.remove(image)
            finished[id(image.ask)] = model.decode(image.latents)[0]
        tick += 1
    return [finished[id(ask)] for ask in asks]


def _start(model: Any, asks: Sequence[Ask]) -> list[_Image]:
    if not asks:
        return []
    prompts = [prompt for ask in asks for prompt in (ask.prompt, ask.negative_prompt)]
    conditioning = model.encode(prompts)
    images = []
    for index, ask in enumerate(asks):
        schedule = make_schedule(
            ask.solver, model.spec.prediction, model.spec.solver_config, ask.steps, model.num_tokens(*ask.size)
        )
        generator = torch.Generator().manual_seed(ask.seed)
        latents = torch.randn(1, *model.latent_shape(*ask.size), generator=generator) * schedule.noise_scale
        rows = conditioning[2 * index : 2 * index + (2 if ask.guidance > 1 else 1)]
        images.append(_Image(ask, schedule, generator, latents, rows))
    return images


def _step(model: Any, images: Sequence[_Image]) -> None:
    rows = [(image, conditioning) for image in images for conditioning in image.conditioning]
    latents = torch.cat([image.latents for image, _ in rows])
    times = torch.tensor([image.schedule.times[image.step] for image, _ in rows])
    outputs = list(model.predict(latents, times, [conditioning for _, conditioning in rows]).split(1))
    guided = []
    for image in images:
        output = outputs.pop(0)
        if image.ask.guidance > 1:
            without = outputs.pop(0)
            output = without + image.ask.guidance * (output - without)
        guided.append(output)
    latents = torch.cat([image.latents for image in images])
    fresh = torch.cat(
        [
            torch.randn(image.latents.shape, generator=image.generator)
            if image.schedule.is_stochastic
            else torch.zeros_like(image.latents)
            for image in images
        ]
    )
    schedules, steps = [image.schedule for image in images], [image.step for image in images]
    moved = advance(latents, torch.cat(guided), schedules, steps, fresh)
    for image, latent in zip(images, moved.split(1)):
        image.latents, image.step = latent, image.step + 1
