"""Runs a stock pipeline, one image at a time, behind the same scheduler: the runner for models without an adapter.

The pipeline owns its loop; a `PipelineRun` holds it between denoise steps. So an engine step advances it by one denoise
step as if it were computed here, and arrivals, cancels and deadlines are seen in between. The stages around are empty:
the run encodes with its first step and decodes with its last. Some solvers visit a time twice (Heun), so a step here is
a step's share of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.dit.pipeline import PipelineRun, StockPipeline
from serve.engine.interface import DeviceFault
from serve.image.trajectory import ImageBatch, ImageOutput, Stage, Trajectory


@dataclass(slots=True)
class _Progress:
    run: PipelineRun
    share: float = 0.0
    """Of the run's denoise steps, done."""
    pixels: bytes | None = None


class SoloRunner:
    """A `Runner` over batches of one row, for an engine of depth 0. One thread."""

    def __init__(self, pipeline: StockPipeline, device: torch.device):
        self._pipeline = pipeline
        self._device = device
        self._runs: dict[str, _Progress] = {}

    def submit(self, batch: ImageBatch) -> ImageOutput:
        (row,) = batch.rows
        job = row.job
        try:
            if batch.kind is Stage.ENCODE:
                self.release(job.id)
                self._runs[job.id] = _Progress(self._start(job))
                return ImageOutput(num_prompt_tokens=[0])
            progress = self._runs[job.id]
            if batch.kind is Stage.DENOISE:
                _advance(progress, (row.step + 1) / job.num_steps)
                return ImageOutput()
            assert progress.pixels is not None, "the last denoise step left no image"
            return ImageOutput(pixels=[progress.pixels])
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed: {error}") from error

    def collect(self, handle: ImageOutput) -> ImageOutput:
        return handle

    def release(self, job_id: str) -> None:
        """Ends the pipeline's thread, where it is held."""
        if (progress := self._runs.pop(job_id, None)) is not None:
            progress.run.close()

    def check(self) -> None:
        """A pipeline has no cheap known answer, so the device alone is asked for one."""
        ones = torch.ones(64, 64, device=self._device)
        try:
            is_right = bool((ones @ ones == 64).all())
        except RuntimeError as error:
            raise DeviceFault(f"the canary failed: {error}") from error
        if not is_right:
            raise DeviceFault("the device multiplies ones wrongly")

    def warm_up(self) -> None:
        """Compute one step of an image: what is slow the first time, and what is broken shows before anybody asks."""
        spec = self._pipeline.spec
        run = self._pipeline.start(
            "warm-up", width=spec.width, height=spec.height, num_inference_steps=2,
            guidance_scale=spec.guidance_scale, seed=0,
        )  # fmt: skip
        try:
            run.advance()
        finally:
            run.close()

    def _start(self, job: Trajectory) -> PipelineRun:
        return self._pipeline.start(
            job.prompt,
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_steps,
            guidance_scale=job.guidance_scale,
            seed=job.seed,
            negative_prompt=job.negative_prompt,
        )


def _advance(progress: _Progress, share: float) -> None:
    """Go on until that share of the run is done; with all of it comes the image."""
    while progress.share < share - 1e-9 and progress.pixels is None:
        step = progress.run.advance()
        progress.share = step.step / step.num_steps
        if step.pixels is not None:
            if not step.pixels.isfinite().all():
                raise ArithmeticError("the pipeline's image is not finite")
            progress.pixels = (step.pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tobytes()
