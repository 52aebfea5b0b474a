"""How fast this engine denoises, and what its load means in seconds.

A denoise step is taken to cost by its work, rows x latent tokens: `unit_s` is the seconds of the last steps over their
work. Encoding and decoding are a cost of their own per image. So

    backlog = latent tokens of all denoise steps left x seconds a token + images x seconds around them

and a newcomer, who shares the device with those that run, waits no longer than that. Not modelled: the fixed cost of a
step, and attention, which grows faster than the tokens (a fifth of a FLUX step at 1024 x 1024, less below).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from serve.backend import Load
from serve.image.trajectory import ImageBatch, Stage, Trajectory

MEMORY = 64
"""Steps that an average looks back over."""
FIRST_TOKEN_S = 1e-4
"""Until a step was computed: a latent token of a row."""


class ImagePace:
    """A `Pace` over trajectories. `num_tokens` tells the latent tokens of an image from its width and height."""

    def __init__(self, num_tokens: Callable[[int, int], int]):
        self._num_tokens = num_tokens
        self._denoise_s, self._num_denoised = FIRST_TOKEN_S, 1.0
        self._around_s = dict.fromkeys((Stage.ENCODE, Stage.DECODE), 0.0)
        """Of an image."""
        self._tokens_per_pixel = 1 / 256

    def on_step(self, batch: ImageBatch, step_s: float) -> None:
        if batch.kind is Stage.DENOISE:
            keep = 1 - 1 / MEMORY
            self._denoise_s = keep * self._denoise_s + step_s
            self._num_denoised = keep * self._num_denoised + batch.num_tokens
            job = batch.rows[0].job
            self._tokens_per_pixel = job.num_tokens / (job.width * job.height)
        else:
            self._around_s[batch.kind] += (step_s / len(batch.rows) - self._around_s[batch.kind]) / MEMORY

    def on_finish(self, job: Trajectory) -> None:
        """How long it took says nothing that its steps have not."""

    def cost_s(self, job: Trajectory) -> float:
        num_tokens = job.num_steps * job.num_rows * self._num_tokens(job.width, job.height)
        return num_tokens * self._token_s + self._job_s

    def predict(self, load: Load) -> Load:
        backlog_s = load.tokens_owed * self._token_s + (load.running + load.waiting) * self._job_s
        unit_s = self._token_s * self._tokens_per_pixel
        return replace(load, backlog_s=backlog_s, unit_s=unit_s, job_s=self._job_s)

    @property
    def _token_s(self) -> float:
        return self._denoise_s / self._num_denoised

    @property
    def _job_s(self) -> float:
        return sum(self._around_s.values())
