"""Solvers against diffusers' schedulers, step by step, alone and as rows of one batch.

Each step starts from the latent diffusers had, so the tolerance is that of one step: a few roundings of float32, since
diffusers adds and divides in another order. Times are equal to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from serve.image.solver import advance, estimate_x0, make_schedule, solver_names

SHAPE = (1, 4, 6, 6)
NUM_TOKENS = 600
MU = 0.5 + (1.15 - 0.5) * (NUM_TOKENS - 256) / (4096 - 256)

FLOW_CONFIGS = [
    {},
    {"shift": 3.0},
    {"shift": 1.7, "num_train_timesteps": 500},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
]
ALPHA_CONFIGS = [
    {},
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.3},
    {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"},
    {"clip_sample": False, "timestep_spacing": "trailing"},
    {"clip_sample": False, "timestep_spacing": "linspace"},
    {"clip_sample": False, "trained_betas": [0.001, 0.004, 0.01, 0.02] * 25, "num_train_timesteps": 100},
]
EULER_CONFIGS = [
    {},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "final_sigmas_type": "sigma_min"},
]
STEPS = [1, 2, 7, 28]


def model(latents: torch.Tensor, time: float) -> torch.Tensor:
    """Something smooth and bounded in place of a transformer."""
    return torch.sin(3.0 * latents + time / 1000.0) + 0.1 * latents


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Trace:
    """A whole trajectory of one of diffusers' schedulers, a row per step. Latents as the model takes them in."""

    first: torch.Tensor
    latents: torch.Tensor
    outputs: torch.Tensor
    noise: torch.Tensor
    after: torch.Tensor
    estimates: torch.Tensor | None


def trace(scheduler, num_steps: int, **set_timesteps) -> Trace:
    scheduler.set_timesteps(num_steps, **set_timesteps)
    drawn, shadow = noise(1), noise(1)
    first = torch.randn(SHAPE, generator=drawn)
    torch.randn(SHAPE, generator=shadow)
    latents = first * getattr(scheduler, "init_noise_sigma", 1.0)
    has_scale = hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "sigmas")
    rows = []
    for index, time in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(latents, time) if has_scale else latents
        outputs = model(inputs, float(time))
        step = scheduler.step(outputs, time, latents, generator=drawn)
        latents = step.prev_sample
        after = latents / (1 + scheduler.sigmas[index + 1] ** 2) ** 0.5 if has_scale else latents
        estimate = step.get("pred_original_sample", torch.zeros(SHAPE))
        rows.append((inputs, outputs, torch.randn(SHAPE, generator=shadow), after, estimate))
    *columns, estimates = (torch.cat(column) for column in zip(*rows))
    return Trace(first, *columns, estimates if "pred_original_sample" in step else None)


def assert_equals(schedule, expected: Trace) -> None:
    """Every step from the latent that diffusers had there: rows of one call.

    What may differ is the rounding of the latent, as much larger as the step magnifies it: a first estimate can be
    hundreds in size, and a last step from far out is as bad.
    """
    rows = [schedule] * schedule.num_steps, range(schedule.num_steps)
    sizes = expected.latents.abs().amax(dim=(1, 2, 3))
    magnified_after = torch.tensor([step.latent + step.x0_latent * step.estimate for step in schedule.steps])
    magnified_estimate = torch.tensor([step.x0_latent for step in schedule.steps])
    assert_close(expected.first * schedule.noise_scale, expected.latents[:1], sizes[:1])
    after = advance(expected.latents, expected.outputs, *rows, expected.noise)
    assert_close(after, expected.after, sizes * magnified_after.clamp(min=1))
    if expected.estimates is not None:
        estimates = estimate_x0(expected.latents, expected.outputs, *rows)
        assert_close(estimates, expected.estimates, sizes * magnified_estimate)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, sizes: torch.Tensor) -> None:
    errors = (ours - theirs).abs().amax(dim=(1, 2, 3)) / sizes
    assert errors.max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("config", FLOW_CONFIGS, ids=str)
@pytest.mark.parametrize("name", ["flow_match_euler", "flow_match_euler_stochastic"])
def test_flow_matching_equals_diffusers(name, config, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(**config, stochastic_sampling=name.endswith("stochastic"))
    mu = {"mu": MU} if config.get("use_dynamic_shifting") else {}
    expected = trace(scheduler, num_steps, **mu)
    schedule = make_schedule(name, "flow", scheduler.config, num_steps, NUM_TOKENS)
    assert schedule.times == tuple(scheduler.timesteps.tolist())
    assert_equals(schedule, expected)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("config", ALPHA_CONFIGS, ids=str)
def test_ddim_equals_diffusers(config, num_steps):
    scheduler = DDIMScheduler(**config)
    expected = trace(scheduler, num_steps)
    schedule = make_schedule("ddim", "epsilon", scheduler.config, num_steps)
    assert schedule.times == tuple(scheduler.timesteps.tolist())
    assert_equals(schedule, expected)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("config", EULER_CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [("euler", EulerDiscreteScheduler), ("euler_ancestral", EulerAncestralDiscreteScheduler)],
)
def test_euler_equals_diffusers(name, scheduler_class, config, num_steps):
    if name == "euler_ancestral":
        config = {key: value for key, value in config.items() if key != "final_sigmas_type"}
    scheduler = scheduler_class(**config)
    expected = trace(scheduler, num_steps)
    schedule = make_schedule(name, "epsilon", scheduler.config, num_steps)
    assert schedule.times == tuple(scheduler.timesteps.tolist())
    assert_equals(schedule, expected)


def test_rows_with_different_solvers_and_steps_share_one_call():
    config = {"clip_sample": False}
    schedules = [
        make_schedule("ddim", "epsilon", config, 5),
        make_schedule("euler", "epsilon", config, 9),
        make_schedule("euler_ancestral", "epsilon", config, 3),
        make_schedule("ddim", "epsilon", {"clip_sample": True}, 50),
    ]
    indices = [4, 0, 1, 20]
    latents, outputs, fresh = torch.randn(3, 4, *SHAPE[1:], generator=noise(4))
    together = advance(latents, outputs, schedules, indices, fresh)
    estimates = estimate_x0(latents, outputs, schedules, indices)
    for row, (schedule, index) in enumerate(zip(schedules, indices)):
        one = slice(row, row + 1)
        alone = advance(latents[one], outputs[one], [schedule], [index], fresh[one])
        torch.testing.assert_close(together[one], alone, rtol=0, atol=0)
        alone = estimate_x0(latents[one], outputs[one], [schedule], [index])
        torch.testing.assert_close(estimates[one], alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "prediction"), [("flow_match_euler", "flow"), ("ddim", "epsilon"), ("euler", "epsilon")]
)
def test_the_last_estimate_is_the_finished_latent(name, prediction):
    schedule = make_schedule(name, prediction, {}, 6)
    latents, outputs = torch.randn(2, *SHAPE, generator=noise(5))
    finished = advance(latents, outputs, [schedule], [5])
    torch.testing.assert_close(finished, estimate_x0(latents, outputs, [schedule], [5]), rtol=1e-5, atol=1e-5)


def test_an_unknown_solver_is_refused_with_the_names_of_the_others():
    with pytest.raises(ValueError, match=r"'heun': unknown; use one of ddim, euler, euler_ancestral"):
        make_schedule("heun", "epsilon", {}, 5)


def test_a_solver_for_another_prediction_is_refused_with_those_that_fit():
    with pytest.raises(
        ValueError, match=r"predicts 'flow', which 'ddim' does not solve; use one of flow_match_euler, "
    ):
        make_schedule("ddim", "flow", {}, 5)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_step_counts_outside_of_training_are_refused(num_steps):
    with pytest.raises(ValueError, match=r"num_inference_steps is .* from 1 to 1000"):
        make_schedule("ddim", "epsilon", {}, num_steps)


def test_an_offset_past_the_end_of_training_is_refused():
    with pytest.raises(ValueError, match="steps_offset"):
        make_schedule("ddim", "epsilon", {"steps_offset": 1}, 1000)


@pytest.mark.parametrize(
    ("prediction", "config"),
    [
        ("epsilon", {"prediction_type": "v_prediction"}),
        ("epsilon", {"thresholding": True}),
        ("epsilon", {"rescale_betas_zero_snr": True}),
        ("epsilon", {"use_karras_sigmas": True}),
        ("epsilon", {"beta_schedule": "sigmoid"}),
        ("epsilon", {"timestep_spacing": "odd"}),
        ("flow", {"shift_terminal": 0.1}),
        ("flow", {"invert_sigmas": True}),
        ("flow", {"use_beta_sigmas": True}),
        ("flow", {"invented_later": 3}),
    ],
    ids=str,
)
def test_what_a_config_asks_for_and_is_not_computed_is_refused_by_name(prediction, config):
    for name in solver_names(prediction):
        with pytest.raises(ValueError, match=f"sets {next(iter(config))} to"):
            make_schedule(name, prediction, config, 5)


def test_an_option_that_is_switched_off_is_no_reason_to_refuse():
    make_schedule("flow_match_euler", "flow", {"invented_later": False, "shift_terminal": None, "_class_name": "X"}, 5)


def test_noise_must_be_given_where_it_is_used():
    schedule = make_schedule("flow_match_euler_stochastic", "flow", {}, 5)
    with pytest.raises(ValueError, match="noise"):
        advance(torch.zeros(SHAPE), torch.zeros(SHAPE), [schedule], [0])
