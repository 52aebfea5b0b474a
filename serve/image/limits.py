"""What a trajectory may ask for: refused at the door is what could never run, by name, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from serve.errors import InvalidRequest
from serve.image.trajectory import Trajectory
from serve.request import ImageLimits

_MOST_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model can take, and its own word on prompts."""

    image: ImageLimits
    check_prompt: Callable[[str], None]
    """Raises ValueError, with the remedy, for a prompt that the model cannot encode."""
    check_schedule: Callable[[str, int], None]
    """Raises ValueError, with the remedy, for a number of steps that this solver cannot take."""

    def check(self, job: Trajectory) -> None:
        """Raise `InvalidRequest`. Reads only, on any thread."""
        self._check_size(job)
        if not 1 <= job.num_steps <= self.image.max_steps:
            raise InvalidRequest(
                f"num_inference_steps is {job.num_steps}; give a value from 1 to {self.image.max_steps}",
                param="num_inference_steps",
            )
        if job.solver not in self.image.solvers:
            raise InvalidRequest(
                f"scheduler {job.solver!r} is not one of this model's; use one of {', '.join(self.image.solvers)}",
                param="scheduler",
            )
        try:
            self.check_schedule(job.solver, job.num_steps)
        except ValueError as error:
            raise InvalidRequest(str(error), param="num_inference_steps") from error
        if not 0 <= job.seed <= _MOST_SEED:
            raise InvalidRequest(f"seed is {job.seed}; give a value from 0 to 2^64 - 1", param="seed")
        if job.num_previews < 0:
            raise InvalidRequest(f"partial_images is {job.num_previews}; it must be at least 0", param="partial_images")
        self._check_guidance(job)
        for param, prompt in (("prompt", job.prompt), ("negative_prompt", job.negative_prompt)):
            try:
                if prompt or param == "prompt":
                    self.check_prompt(prompt)
            except ValueError as error:
                raise InvalidRequest(str(error), param=param) from error

    def _check_size(self, job: Trajectory) -> None:
        limits, size = self.image, f"{job.width}x{job.height}"
        if limits.sizes:
            if (job.width, job.height) not in limits.sizes:
                known = ", ".join(f"{width}x{height}" for width, height in limits.sizes)
                raise InvalidRequest(f"size {size} is not one this model makes; use one of {known}", param="size")
            return
        for name, value in (("width", job.width), ("height", job.height)):
            if value < 1 or value % limits.size_multiple:
                nearest = max(1, round(value / limits.size_multiple)) * limits.size_multiple
                raise InvalidRequest(
                    f"{name} is {value}, not a multiple of {limits.size_multiple}; use {nearest}, say", param=name
                )
        if limits.max_side and max(job.width, job.height) > limits.max_side:
            raise InvalidRequest(
                f"size {size} has a side longer than the {limits.max_side} pixels of this model; make it smaller",
                param="size",
            )
        if job.width * job.height > limits.max_pixels:
            raise InvalidRequest(
                f"size {size} is {job.width * job.height} pixels, more than the {limits.max_pixels} of this model; "
                f"make it smaller",
                param="size",
            )

    def _check_guidance(self, job: Trajectory) -> None:
        if not math.isfinite(job.guidance_scale) or job.guidance_scale < 0:
            raise InvalidRequest(
                f"guidance_scale is {job.guidance_scale}; give a number of at least 0", param="guidance_scale"
            )
        if self.image.has_guidance and not self.image.has_negative_prompt and job.negative_prompt:
            raise InvalidRequest("this model takes no negative_prompt; leave it out", param="negative_prompt")
        if self.image.has_guidance:
            if job.negative_prompt and not job.is_guided:
                raise InvalidRequest(
                    f"negative_prompt does nothing at guidance_scale {job.guidance_scale:g}; raise that above 1 or "
                    f"leave negative_prompt out",
                    param="negative_prompt",
                )
            return
        if job.is_guided:
            raise InvalidRequest(
                f"guidance_scale is {job.guidance_scale:g}, but this model computes no guidance; leave it out",
                param="guidance_scale",
            )
        if job.negative_prompt:
            raise InvalidRequest(
                "negative_prompt is given, but this model computes no guidance; leave it out", param="negative_prompt"
            )
