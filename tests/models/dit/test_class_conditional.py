"""The class-conditional adapter against diffusers' pipeline, from the same files."""

from __future__ import annotations

import pytest
import torch
from denoise import Ask, denoise
from diffusers import DiTPipeline, EulerDiscreteScheduler
from tiny_pipelines import LABELS, dit_pipeline, save

from models.dit.class_conditional import ClassNames
from models.dit.registry import load_dit

CPU = torch.device("cpu")
EQUAL = {"rtol": 0, "atol": 2e-5}
"""Pixels in 0..1. Rows of a larger batch are added up in another order; the largest difference seen is 6.3e-7."""

ASKS = [
    Ask(prompt="goldfish", seed=1, steps=8, guidance=4.0, solver="ddim"),
    Ask(prompt="7", seed=2, steps=3, guidance=1.0, solver="ddim", joins_at=2),
    Ask(prompt="White Shark", seed=3, steps=12, guidance=1.5, solver="ddim", joins_at=1),
    Ask(prompt="999", seed=4, steps=5, guidance=7.0, solver="ddim", joins_at=1),
    Ask(prompt="cock", seed=5, steps=6, guidance=3.0, solver="euler", joins_at=3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(dit_pipeline(), tmp_path_factory.mktemp("models") / "dit")


@pytest.fixture(scope="module")
def model(folder):
    return load_dit(folder, device=CPU)


@pytest.fixture(scope="module")
def stock(folder):
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_image(pipeline, label: int, ask: Ask) -> torch.Tensor:
    if ask.solver == "euler":
        return euler_image(pipeline, label, ask)
    return pipeline(
        class_labels=[label],
        guidance_scale=ask.guidance,
        num_inference_steps=ask.steps,
        generator=torch.Generator().manual_seed(ask.seed),
        output_type="pt",
    ).images[0]


@torch.no_grad()
def euler_image(pipeline, label: int, ask: Ask) -> torch.Tensor:
    """By hand: `DiTPipeline` steps the scaled latents, which its own DDIM does not scale."""
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(ask.steps)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(ask.seed)) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        inputs = torch.cat([scheduler.scale_model_input(latents, time)] * 2)
        labels = torch.tensor([label, 1000])
        output = pipeline.transformer(inputs, timestep=time.expand(2), class_labels=labels).sample[:, :4]
        with_class, without = output.chunk(2)
        latents = scheduler.step(without + ask.guidance * (with_class - without), time, latents).prev_sample
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)[0]


LABEL_OF = {"goldfish": 1, "7": 7, "White Shark": 2, "999": 999, "cock": 7}


@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_an_image_alone_equals_the_stock_pipeline(model, stock, ask):
    (image,) = denoise(model, [ask])
    torch.testing.assert_close(image, stock_image(stock, LABEL_OF[ask.prompt], ask), **EQUAL)


def test_images_that_share_forwards_equal_the_stock_pipeline(model, stock):
    for ask, image in zip(ASKS, denoise(model, ASKS)):
        torch.testing.assert_close(image, stock_image(stock, LABEL_OF[ask.prompt], ask), **EQUAL)


def test_another_class_gives_another_image(model):
    """Else equality would say nothing."""
    asks = [Ask(prompt=prompt, seed=1, solver="ddim") for prompt in ("0", "1")]
    first, second = denoise(model, asks)
    assert (first - second).abs().mean() > 0.01


def test_the_empty_prompt_is_the_class_guidance_leads_away_from(model):
    (conditioning,) = model.encode([""])
    assert conditioning.tensors["label"].tolist() == [1000]


def test_a_model_in_half_precision_is_close_and_keeps_latents_in_float32(model, folder):
    half = load_dit(folder, device=CPU, dtype=torch.bfloat16)
    latents, times = torch.randn(2, 4, 16, 16), torch.tensor([900.0, 10.0])
    exact = model.predict(latents, times, model.encode(["1", "2"]))
    rough = half.predict(latents, times, half.encode(["1", "2"]))
    assert half.spec.dtype == torch.bfloat16 and rough.dtype == torch.float32
    # bfloat16 keeps 8 bits, lost anew in each of some twenty operations in a row
    assert (exact - rough).abs().mean() < 0.05 * exact.abs().mean()


def test_what_the_model_says_of_itself(model):
    spec = model.spec
    assert (spec.prediction, spec.solvers[0], spec.dtype) == ("epsilon", "ddim", torch.float32)
    assert (spec.width, spec.height, spec.sizes) == (32, 32, ((32, 32),))
    assert (spec.num_inference_steps, spec.guidance_scale) == (50, 4.0)
    assert model.latent_shape(32, 32) == (4, 16, 16)
    assert model.num_tokens(32, 32) == 64


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("tench", 0),
        ("Tinca Tinca", 0),
        ("tench, Tinca tinca", 0),
        (" 2 ", 2),
        ("WHITE SHARK", 2),
        ("999", 999),
        ("", 1000),
    ],
)
def test_a_class_goes_by_number_or_by_any_of_its_names(prompt, number):
    assert ClassNames(1000, LABELS).number(prompt) == number


def test_an_unknown_class_is_refused_with_the_nearest_names(model):
    with pytest.raises(ValueError, match=r"number, 0 to 999, or by its name; nearest are 'goldfish'"):
        model.check_prompt("gold fish")


@pytest.mark.parametrize("prompt", ["1000", "-1", "1.5", "²", "9" * 5000, "x" * 100_000])
def test_what_is_no_class_is_refused(model, prompt):
    with pytest.raises(ValueError, match="the prompt is no class"):
        model.check_prompt(prompt)


def test_without_names_only_numbers_are_known():
    with pytest.raises(ValueError, match=r"give a class by its number, 0 to 9$"):
        ClassNames(10, {}).number("goldfish")
