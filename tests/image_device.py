"""A fake device for images: no model, but a memory. A latent is a hash of all that was done to it, one per state.

A scheduler that skips, repeats or reorders an operation, or settles states too early, makes it read a state that is not
there or gives other pixels than `image_alone`. Batches are computed when they are collected, as late as a real device
may.
"""

from __future__ import annotations

from typing import Any

from fakes import Saboteur

from serve.image.limits import Limits
from serve.image.scheduler import ImageScheduler
from serve.image.trajectory import ImageBatch, ImageOutput, Row, Stage, Trajectory
from serve.request import ImageLimits

SOLVERS = ("flow_match_euler", "ddim")
Output = tuple[int, bytes | None]


def limits(**values: Any) -> ImageLimits:
    defaults: dict[str, Any] = {
        "width": 16, "height": 16, "num_inference_steps": 4, "guidance_scale": 1.0,
        "size_multiple": 2, "max_pixels": 64 * 64, "max_steps": 50, "solvers": SOLVERS,
    }  # fmt: skip
    return ImageLimits(**defaults | values)


def num_tokens(width: int, height: int) -> int:
    return width * height // 4


def make_scheduler(*, max_num_images: int = 8, max_num_batched_tokens: int = 1 << 20, **values: Any) -> ImageScheduler:
    return ImageScheduler(
        Limits(limits(**values), lambda prompt: None, lambda solver, num_steps: None),
        num_tokens,
        max_num_images=max_num_images,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def trajectory(job_id: str = "a", **values: Any) -> Trajectory:
    defaults: dict[str, Any] = {
        "prompt": f"prompt of {job_id}", "width": 4, "height": 4, "num_steps": 4, "guidance_scale": 1.0,
        "solver": SOLVERS[0], "seed": 0,
    }  # fmt: skip
    return Trajectory(id=job_id, **defaults | values)


def image_alone(job: Trajectory) -> list[Output]:
    """The oracle: what a trajectory shows, by the definition of its parameters: (steps done, pixels or None)."""
    latent, outputs = hash((job.prompt, job.seed, job.width, job.height)), list[Output]()
    for stage, step in job.operations[1:]:
        if stage is Stage.DENOISE:
            latent = hash((latent, step, job.guidance_scale, job.solver))
            outputs.append((step + 1, None))
        else:
            outputs.append((step, _pixels(latent)))
    return outputs


def _pixels(latent: int) -> bytes:
    return str(latent).encode()


class ImageDevice:
    """A `Runner` over `ImageBatch`."""

    def __init__(self, saboteur: Saboteur | None = None):
        self.saboteur = saboteur or Saboteur()
        self.states: dict[str, dict[int, int]] = {}
        """Job id → position → the latent before that operation."""
        self.in_flight: list[ImageBatch] = []
        self.batches: list[ImageBatch] = []

    def submit(self, batch: ImageBatch) -> ImageBatch:
        self.batches.append(batch)
        self.saboteur.strike("submit", self._progress(batch))
        self.in_flight.append(batch)
        return batch

    def collect(self, handle: ImageBatch) -> ImageOutput:
        assert self.in_flight.pop(0) is handle, "collected out of order"
        assert len({(row.job.width, row.job.height) for row in handle.rows}) == 1 or handle.kind is Stage.ENCODE
        assert {row.job.operations[row.position].stage for row in handle.rows} == {handle.kind}
        output = ImageOutput()
        for row in handle.rows:
            self._compute(row, handle.kind, output)
        self.saboteur.strike("collect", self._progress(handle))
        return output

    def release(self, job_id: str) -> None:
        self.states.pop(job_id, None)

    def check(self) -> None:
        self.saboteur.check()

    def _compute(self, row: Row, stage: Stage, output: ImageOutput) -> None:
        job = row.job
        states = self.states.setdefault(job.id, {})
        for position in [position for position in states if position < row.num_settled]:
            del states[position]
        if stage is Stage.ENCODE:
            states[1] = hash((job.prompt, job.seed, job.width, job.height))
            output.num_prompt_tokens.append(len(job.prompt))
            return
        latent = states[row.position]
        if stage is Stage.DENOISE:
            latent = hash((latent, row.step, job.guidance_scale, job.solver))
        else:
            output.pixels.append(_pixels(latent))
        states[row.position + 1] = latent

    @staticmethod
    def _progress(batch: ImageBatch) -> list[tuple[str, int]]:
        return [(row.job.id, row.position - 1) for row in batch.rows]
