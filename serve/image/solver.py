"""Solvers of the denoising ODE as pure functions; a trajectory's state is its latent, its `Schedule` and a step index.

Every solver here is affine in (latent, model output, noise), with coefficients that follow from the noise schedule and
the step alone. So a schedule is a table of numbers, made once per trajectory in float64 on the host, and one call of
`advance` moves the rows of a batch each by its own line of its own table: rows with different solvers, step counts and
steps are one broadcast expression, without a loop over rows and without waiting for the device.

A latent is always what the model takes in. Solvers that diffusers writes in the variance-exploding space (x = x0 + σ ε,
scaled before each forward) are kept divided by √(1 + σ²): that is the model's input, and it stays near one in size.

Names, configurations and numbers are those of diffusers' schedulers, after their papers: flow matching (Lipman et al.,
2023; Esser et al., 2024), DDIM (Song et al., 2021), Euler and its ancestral form (Karras et al., 2022; k-diffusion).
What a configuration asks for and is not computed here is refused by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Legend: R rows, C latent channels, H and W latent height and width


@dataclass(frozen=True, slots=True)
class Step:
    """One step's coefficients: estimate = x0_latent · x + x0_output · v, held within ± clip; then
    next = latent · x + output · v + estimate · (that) + noise · n."""

    time: float
    """What the model is told, in the units it was trained with."""
    x0_latent: float
    x0_output: float
    latent: float = 0.0
    output: float = 0.0
    estimate: float = 0.0
    noise: float = 0.0
    clip: float = math.inf

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (self.x0_latent, self.x0_output, self.latent, self.output, self.estimate, self.noise, self.clip)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The whole way of one trajectory from noise to image."""

    solver: str
    steps: tuple[Step, ...]
    noise_scale: float
    """The first latent is normal noise times this."""

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(step.time for step in self.steps)

    @property
    def is_stochastic(self) -> bool:
        """Whether `advance` wants noise, one draw of the latent's shape per step."""
        return any(step.noise for step in self.steps)


def make_schedule(
    name: str, prediction: str, config: Mapping[str, Any], num_steps: int, num_tokens: int = 0
) -> Schedule:
    """The schedule of solver `name` over `num_steps` for a checkpoint's `scheduler_config.json`.

    `prediction` is the model's ("flow" or "epsilon"); `num_tokens`, the image's latent tokens, shifts the times where
    the configuration says so. Keys that only another solver knows are passed over, as `from_config` of diffusers does.
    Raises ValueError: an unknown solver, one for the other kind of prediction, too few or too many steps, or a
    configuration that is not computed here.
    """
    known = solver_names(prediction)
    if name not in known:
        kind = f"this model predicts {prediction!r}, which {name!r} does not solve" if name in _SOLVERS else "unknown"
        raise ValueError(f"solver {name!r}: {kind}; use one of {', '.join(known)}")
    _, make = _SOLVERS[name]
    _check_config(name, prediction, config)
    limit = int(config.get("num_train_timesteps", 1000))
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_inference_steps is {num_steps}; give a value from 1 to {limit}")
    return make(name, config, num_steps, num_tokens)


def solver_names(prediction: str) -> tuple[str, ...]:
    """The solvers for a kind of prediction."""
    return tuple(name for name, (kind, _) in _SOLVERS.items() if kind == prediction)


def advance(
    latents_RCHW: Tensor,
    outputs_RCHW: Tensor,
    schedules: Sequence[Schedule],
    indices: Sequence[int],
    noise_RCHW: Tensor | None = None,
) -> Tensor:
    """Every row one step on: row r from step `indices[r]` of `schedules[r]` to the next. float32.

    `outputs_RCHW` is the model's, after guidance. `noise_RCHW` is needed when a schedule is stochastic; the rows of
    the others may hold anything finite.
    """
    table = _table(schedules, indices, latents_RCHW)
    estimates = _estimate(latents_RCHW, outputs_RCHW, table)
    _, _, latent, output, estimate, noise, _ = table
    moved = latent * latents_RCHW + output * outputs_RCHW + estimate * estimates
    if noise_RCHW is not None:
        return moved + noise * noise_RCHW
    if any(schedule.is_stochastic for schedule in schedules):
        raise ValueError("a stochastic solver advances with noise; give noise_RCHW")
    return moved


def estimate_x0(
    latents_RCHW: Tensor, outputs_RCHW: Tensor, schedules: Sequence[Schedule], indices: Sequence[int]
) -> Tensor:
    """The finished latent as each row's step sees it, from what goes into `advance`. Decoded it is a preview."""
    return _estimate(latents_RCHW, outputs_RCHW, _table(schedules, indices, latents_RCHW))


def _table(schedules: Sequence[Schedule], indices: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
    """Coefficients as columns (R, 1, 1, 1): one small copy to the device, nothing read back."""
    rows = [schedule.steps[index].coefficients for schedule, index in zip(schedules, indices, strict=True)]
    columns = torch.tensor(rows, dtype=torch.float32).to(like.device, non_blocking=True)
    return columns.view(len(rows), -1, *(1,) * (like.dim() - 1)).unbind(1)


def _estimate(latents: Tensor, outputs: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    x0_latent, x0_output, *_, clip = table
    return (x0_latent * latents + x0_output * outputs).clamp(-clip, clip)


def _flow_match_euler(name: str, config: Mapping[str, Any], num_steps: int, num_tokens: int) -> Schedule:
    sigmas, times = _flow_sigmas(config, num_steps, num_tokens)
    steps = []
    for time, sigma, after in zip(times, sigmas, sigmas[1:]):
        if name == "flow_match_euler":
            steps.append(Step(time, 1.0, -sigma, latent=1.0, output=after - sigma))
        else:
            steps.append(Step(time, 1.0, -sigma, estimate=1.0 - after, noise=after))
    return Schedule(name, tuple(steps), noise_scale=1.0)


def _flow_sigmas(config: Mapping[str, Any], num_steps: int, num_tokens: int) -> tuple[list[float], list[float]]:
    """σ of every step and 0 at the end, and the times.

    Rounded to float32 where diffusers rounds: the model's sines and cosines of a time near 1000 would show the
    difference. With a fixed shift the ends of the range are shifted twice, as in diffusers; models are sampled so.
    """
    train = int(config.get("num_train_timesteps", 1000))
    ends = np.array([train, 1], dtype=np.float32) / np.float32(train)
    is_dynamic = config.get("use_dynamic_shifting", False)
    shift = float(config.get("shift", 1.0))
    if not is_dynamic:
        ends = np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends)
    sigmas = np.linspace(float(ends[0]) * train, float(ends[1]) * train, num_steps) / train
    if is_dynamic:
        mu = _dynamic_shift(config, num_tokens)
        if config.get("time_shift_type", "exponential") == "exponential":
            mu = math.exp(mu)
        sigmas = mu / (mu + (1 / sigmas - 1))
    else:
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    rounded = sigmas.astype(np.float32)
    return [*rounded.tolist(), 0.0], (rounded * np.float32(train)).tolist()


def _dynamic_shift(config: Mapping[str, Any], num_tokens: int) -> float:
    """Larger images get more noise: linear in the number of tokens, as diffusers' `calculate_shift`."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return num_tokens * slope + (low - slope * few)


def _ddim(name: str, config: Mapping[str, Any], num_steps: int, num_tokens: int) -> Schedule:
    alphas = _alphas(config)
    stride = len(alphas) // num_steps
    last = 1.0 if config.get("set_alpha_to_one", True) else alphas[0]
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else math.inf
    steps = []
    for time in _times(config, num_steps, "leading", whole=True):
        at = int(time)
        alpha, after = alphas[at], alphas[at - stride] if at >= stride else last
        x0_output = -math.sqrt(1 - alpha) / math.sqrt(alpha)
        steps.append(
            Step(
                time,
                1 / math.sqrt(alpha),
                x0_output,
                output=math.sqrt(1 - after),
                estimate=math.sqrt(after),
                clip=float(clip),
            )
        )
    return Schedule(name, tuple(steps), noise_scale=1.0)


def _euler(name: str, config: Mapping[str, Any], num_steps: int, num_tokens: int) -> Schedule:
    alphas = _alphas(config)
    levels = [math.sqrt((1 - alpha) / alpha) for alpha in alphas]
    times = _times(config, num_steps, "linspace", whole=False)
    end = levels[0] if config.get("final_sigmas_type", "zero") == "sigma_min" else 0.0
    sigmas = [*np.interp(times, np.arange(len(levels)), levels).tolist(), end]
    steps = []
    for time, sigma, after in zip(times, sigmas, sigmas[1:]):
        # Ancestral: a step to less noise than `after`, and fresh noise up to it.
        up = after * math.sqrt(max(0.0, 1 - (after / sigma) ** 2)) if name == "euler_ancestral" else 0.0
        down = math.sqrt(max(0.0, after**2 - up**2))
        here, there = math.hypot(1, sigma), math.hypot(1, after)
        steps.append(
            Step(time, here, -sigma, latent=here / there, output=(down - sigma) / there, noise=up / there),
        )
    spread_evenly = config.get("timestep_spacing", "linspace") in ("linspace", "trailing")
    return Schedule(name, tuple(steps), noise_scale=sigmas[0] / math.hypot(1, sigmas[0]) if spread_evenly else 1.0)


def _alphas(config: Mapping[str, Any]) -> list[float]:
    """ᾱ of every training step, added up in float32 as diffusers does: models are sampled with these numbers."""
    train = int(config.get("num_train_timesteps", 1000))
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif kind == "linear":
        betas = torch.linspace(start, end, train, dtype=torch.float32)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, train, dtype=torch.float32) ** 2
    else:
        bars = [math.cos((step / train + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(train + 1)]
        betas = torch.tensor(
            [min(1 - after / bar, 0.999) for bar, after in itertools.pairwise(bars)], dtype=torch.float32
        )
    alphas: list[float] = torch.cumprod(1.0 - betas, dim=0).tolist()
    return alphas


def _times(config: Mapping[str, Any], num_steps: int, default: str, *, whole: bool) -> list[float]:
    """Training steps to visit, most noise first (Lin et al., 2024, table 2). `whole`: rounded also for "linspace"."""
    train = int(config.get("num_train_timesteps", 1000))
    spacing = config.get("timestep_spacing", default)
    if spacing == "linspace":
        times = np.linspace(0, train - 1, num_steps, dtype=np.float64 if whole else np.float32)[::-1]
        times = times.round() if whole else times
    elif spacing == "leading":
        times = (np.arange(num_steps) * (train // num_steps))[::-1] + config.get("steps_offset", 0)
    else:
        # diffusers counts down in floating point and may visit a step before the first; here there are num_steps.
        times = np.arange(train, 0, -train / num_steps)[:num_steps].round() - 1
    if times[0] >= train:
        raise ValueError(
            f"num_inference_steps is {num_steps}: with steps_offset {config.get('steps_offset')} the first step would "
            f"lie past the {train} steps of training; ask for fewer"
        )
    return [float(time) for time in times]


_SOLVERS: dict[str, tuple[str, Callable[[str, Mapping[str, Any], int, int], Schedule]]] = {
    "flow_match_euler": ("flow", _flow_match_euler),
    "flow_match_euler_stochastic": ("flow", _flow_match_euler),
    "ddim": ("epsilon", _ddim),
    "euler": ("epsilon", _euler),
    "euler_ancestral": ("epsilon", _euler),
}
"""Names, each with the kind of prediction it solves. `ddim` takes η = 0, the stock default."""

_ALPHA_KEYS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "trained_betas",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
}
_FLOW_KEYS = {
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "stochastic_sampling",
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "prediction_type": ("epsilon",),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
}
"""Keys with the values that are computed here."""


def _check_config(name: str, prediction: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for what would change the result and is not computed here. Any other key that is switched off
    (null or false) is fine, so that new versions of diffusers can add theirs."""
    honoured = _FLOW_KEYS if prediction == "flow" else _ALPHA_KEYS
    for key, value in config.items():
        if key.startswith("_") or key in honoured or value is None or value is False:
            continue
        if key not in _CHOICES:
            raise ValueError(
                f"scheduler_config.json sets {key} to {value!r}, which the solver {name!r} does not compute; "
                f"use a checkpoint without it"
            )
        if value not in _CHOICES[key]:
            allowed = ", ".join(repr(choice) for choice in _CHOICES[key])
            raise ValueError(
                f"scheduler_config.json sets {key} to {value!r}; the solver {name!r} computes {allowed} only"
            )
