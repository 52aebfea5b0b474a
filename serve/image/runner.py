"""Computes image batches: one pass of the text encoders, the transformer or the VAE per step.

Owns the model and every trajectory's tensors: its conditioning, and its latent by position in its operations, from the
last settled one on. An operation reads the state before it and leaves the one after it only when all of its batch is
computed, so a failure changes nothing. A denoise step goes

    latents, times, conditioning → forward over all rows → guidance → solver → next latents

and is the same whoever shares it: solvers and guidance are per row. Latents are float32 whatever the model's dtype.
Noise comes from a generator of the trajectory's own seed on the CPU, drawn as diffusers draws it, so an image equals
the stock pipeline's for this seed, on any device.

On CPU `submit` computes and `collect` hands over. On CUDA `submit` queues everything, the copies to pinned memory and
an event included, and `collect` waits for the event; nothing else waits.

Legend: B trajectories, R rows, C latent channels, H and W latent height and width, P and Q the image's in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from models.dit.base import Conditioning, DiT
from serve.engine.interface import DeviceFault
from serve.image.conditioning import Prompts
from serve.image.forward_graph import ForwardGraphs
from serve.image.solver import Schedule, advance, estimate_x0, make_schedule
from serve.image.trajectory import ImageBatch, ImageOutput, Row, Stage, Trajectory
from serve.transfer import copy_to_device, to_device, to_host

_SCHEDULES = 256
"""Noise schedules kept; one is a few numbers a step."""


@dataclass(slots=True)
class _State:
    """A trajectory before one of its operations."""

    latent_CHW: torch.Tensor
    estimate_CHW: torch.Tensor | None = None
    """The finished latent as the last step saw it, where a preview comes next."""
    random: torch.Tensor | None = None
    """The generator's state, where the solver draws noise at every step."""


@dataclass(slots=True)
class _Tensors:
    """What is kept for one trajectory."""

    schedule: Schedule
    prompt: Conditioning
    negative: Conditioning | None
    """Where it is guided."""
    states: dict[int, _State]
    """By position; those that a failure could make necessary again, and later ones."""


@dataclass(slots=True)
class _Flight:
    """A submitted batch: results in host memory once `done` has happened."""

    num_prompt_tokens: list[int]
    jobs: list[Trajectory]
    finite_B: torch.Tensor | None = None
    """Whether what was computed for each is a number."""
    pixels_BPQ3: torch.Tensor | None = None
    done: torch.cuda.Event | None = None


class ImageRunner:
    """A `Runner` over `ImageBatch`. One thread."""

    def __init__(self, model: DiT, device: torch.device, graphs: ForwardGraphs | None = None):
        """`graphs`: of this model, for denoise steps; None: they run without."""
        self.model = model
        self._forward = model.predict if graphs is None else graphs.predict
        self._device = device
        self._prompts = Prompts(model)
        self._tensors: dict[str, _Tensors] = {}
        self._schedule = lru_cache(_SCHEDULES)(self._make_schedule)
        self._canary_output: torch.Tensor | None = None

    # -- the contract ----------------------------------------------------------------------------------------------

    def submit(self, batch: ImageBatch) -> _Flight:
        try:
            with torch.inference_mode():
                for row in batch.rows:
                    self._forget_settled(row)
                flight = self._compute(batch)
                if self._device.type == "cuda":
                    flight.done = torch.cuda.Event()
                    flight.done.record()
                return flight
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed: {error}") from error

    def collect(self, handle: _Flight) -> ImageOutput:
        if handle.done is not None:
            try:
                handle.done.synchronize()
            except (torch.AcceleratorError, RuntimeError) as error:
                raise DeviceFault(f"the device failed: {error}") from error
        if handle.finite_B is not None:
            unfit = [job.id for job, is_fine in zip(handle.jobs, handle.finite_B.tolist(), strict=True) if not is_fine]
            if unfit:
                raise ArithmeticError(f"what was computed for {', '.join(unfit)} is not finite")
        pixels = [] if handle.pixels_BPQ3 is None else [image.numpy().tobytes() for image in handle.pixels_BPQ3]
        return ImageOutput(handle.num_prompt_tokens, pixels)

    def release(self, job_id: str) -> None:
        self._tensors.pop(job_id, None)

    def warm_up(self) -> None:
        """Compute once what is slow the first time, and note what the canary must answer from now on."""
        self._canary_output = self._canary()
        with torch.inference_mode():
            shape = self.model.latent_shape(self.model.spec.width, self.model.spec.height)
            pixels = self.model.decode(torch.zeros(1, *shape, device=self._device))
        if not (self._canary_output.isfinite().all() and pixels.isfinite().all()):
            raise DeviceFault("the model's very first outputs are not finite; its weights or its dtype are unfit")

    def check(self) -> None:
        """Compute the canary again. Rounding may differ with the load of the device, nothing else may."""
        assert self._canary_output is not None, "warm_up has not run"
        try:
            output = self._canary()
        except RuntimeError as error:
            raise DeviceFault(f"the canary failed: {error}") from error
        scale = float(self._canary_output.abs().max())
        if not torch.allclose(output, self._canary_output, rtol=0.0, atol=0.05 * scale):
            raise DeviceFault("the canary's output is not what it was at the start; the device computes wrongly")

    def check_schedule(self, solver: str, num_steps: int) -> None:
        """Raise ValueError for a number of steps that the solver cannot take. Any thread."""
        self._schedule(solver, num_steps, 0)

    # -- one step --------------------------------------------------------------------------------------------------

    def _compute(self, batch: ImageBatch) -> _Flight:
        if batch.kind is Stage.ENCODE:
            return self._encode(batch.rows)
        if batch.kind is Stage.DENOISE:
            return self._denoise(batch.rows)
        return self._decode(batch.rows)

    def _encode(self, rows: list[Row]) -> _Flight:
        jobs = [row.job for row in rows]
        wanted = [job.prompt for job in jobs] + [job.negative_prompt for job in jobs if job.is_guided]
        encoded = self._prompts.encode(wanted)
        started = []
        for row in rows:
            job = row.job
            schedule = self._schedule(job.solver, job.num_steps, job.num_tokens)
            negative = encoded[job.negative_prompt] if job.is_guided else None
            state = self._first_state(job, schedule)
            started.append(_Tensors(schedule, encoded[job.prompt], negative, {row.position + 1: state}))
        self._tensors.update(zip((job.id for job in jobs), started))
        return _Flight([encoded[job.prompt].num_tokens for job in jobs], jobs)

    def _denoise(self, rows: list[Row]) -> _Flight:
        tensors = [self._tensors[row.job.id] for row in rows]
        states = [kept.states[row.position] for kept, row in zip(tensors, rows)]
        schedules, steps = [kept.schedule for kept in tensors], [row.step for row in rows]
        latents_BCHW = torch.stack([state.latent_CHW for state in states])
        outputs_BCHW = self._predict(rows, tensors, latents_BCHW)
        drawn = [_draw(state, latents_BCHW[0], self.model.spec.dtype) for state in states]
        noise_BCHW = None
        if any(state.random is not None for state in states):
            noise_BCHW = copy_to_device(torch.stack([noise_CHW for noise_CHW, _ in drawn]), self._device)
        next_BCHW = advance(latents_BCHW, outputs_BCHW, schedules, steps, noise_BCHW)
        estimates_BCHW = None
        if any(row.precedes_preview for row in rows):
            estimates_BCHW = estimate_x0(latents_BCHW, outputs_BCHW, schedules, steps)
        finite_B = to_host(next_BCHW.isfinite().flatten(1).all(1))
        for i, (row, kept) in enumerate(zip(rows, tensors)):
            estimate_CHW = estimates_BCHW[i] if estimates_BCHW is not None and row.precedes_preview else None
            kept.states[row.position + 1] = _State(next_BCHW[i], estimate_CHW, drawn[i][1])
        return _Flight([], [row.job for row in rows], finite_B)

    def _predict(self, rows: list[Row], tensors: list[_Tensors], latents_BCHW: torch.Tensor) -> torch.Tensor:
        """The model's output per trajectory, guidance applied. One forward: every prompt's row, then the negatives'."""
        negatives = {i: kept.negative for i, kept in enumerate(tensors) if kept.negative is not None}
        times = [kept.schedule.steps[row.step].time for kept, row in zip(tensors, rows)]
        latents_RCHW = latents_BCHW
        if negatives:
            latents_RCHW = torch.cat([latents_BCHW, torch.stack([latents_BCHW[i] for i in negatives])])
        outputs = self._forward(
            latents_RCHW,
            to_device(times + [times[i] for i in negatives], self._device, torch.float32),
            [kept.prompt for kept in tensors] + list(negatives.values()),
        ).unbind(0)
        prompted_BCHW = torch.stack(outputs[: len(rows)])
        if not negatives:
            return prompted_BCHW
        # Without guidance a row is its own negative at scale 1, which leaves it exactly as it is.
        negative_of = dict(zip(negatives, outputs[len(rows) :]))
        negative_BCHW = torch.stack([negative_of.get(i, outputs[i]) for i in range(len(rows))])
        scales = [row.job.guidance_scale if row.job.is_guided else 1.0 for row in rows]
        scale_B111 = to_device(scales, self._device, torch.float32).view(-1, 1, 1, 1)
        return negative_BCHW + scale_B111 * (prompted_BCHW - negative_BCHW)

    def _decode(self, rows: list[Row]) -> _Flight:
        kept = [self._tensors[row.job.id].states for row in rows]
        states = [states[row.position] for states, row in zip(kept, rows)]
        shown = [state.estimate_CHW if row.is_preview else state.latent_CHW for state, row in zip(states, rows)]
        pixels_B3PQ = self.model.decode(torch.stack([latent_CHW for latent_CHW in shown if latent_CHW is not None]))
        finite_B = to_host(pixels_B3PQ.isfinite().flatten(1).all(1))
        bytes_B3PQ = (pixels_B3PQ.clamp(0, 1) * 255).round().to(torch.uint8)
        pixels_BPQ3 = to_host(bytes_B3PQ.permute(0, 2, 3, 1).contiguous())
        for states_by_position, state, row in zip(kept, states, rows):
            states_by_position[row.position + 1] = _State(state.latent_CHW, None, state.random)
        return _Flight([], [row.job for row in rows], finite_B, pixels_BPQ3)

    # -- a trajectory's tensors ------------------------------------------------------------------------------------

    def _first_state(self, job: Trajectory, schedule: Schedule) -> _State:
        generator = torch.Generator().manual_seed(job.seed)
        shape = self.model.latent_shape(job.width, job.height)
        noise_CHW = torch.randn((1, *shape), generator=generator, dtype=self.model.spec.dtype)[0]
        latent_CHW = copy_to_device(noise_CHW, self._device).float() * schedule.noise_scale
        return _State(latent_CHW, None, generator.get_state() if schedule.is_stochastic else None)

    def _forget_settled(self, row: Row) -> None:
        if (kept := self._tensors.get(row.job.id)) is not None:
            for position in [position for position in kept.states if position < row.num_settled]:
                del kept.states[position]

    def _make_schedule(self, solver: str, num_steps: int, num_tokens: int) -> Schedule:
        spec = self.model.spec
        return make_schedule(solver, spec.prediction, spec.solver_config, num_steps, num_tokens)

    @torch.inference_mode()
    def _canary(self) -> torch.Tensor:
        """The prediction for fixed noise without a prompt, on the host."""
        spec = self.model.spec
        shape = self.model.latent_shape(spec.width, spec.height)
        noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
        time = torch.full((1,), 500.0, device=self._device)
        return self.model.predict(noise.to(self._device), time, self.model.encode([""])).cpu()


def _draw(state: _State, like_CHW: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next noise of a trajectory, on the host, and its generator's state after it. Zeros where it draws none."""
    if state.random is None:
        return torch.zeros(like_CHW.shape), None
    generator = torch.Generator()
    generator.set_state(state.random)
    noise_CHW = torch.randn((1, *like_CHW.shape), generator=generator, dtype=dtype)[0]
    return noise_CHW.float(), generator.get_state()
