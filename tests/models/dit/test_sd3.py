"""The Stable Diffusion 3 adapter against diffusers' pipeline, from the same files."""

from __future__ import annotations

import pytest
import torch
from denoise import Ask, denoise
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny_pipelines import save, sd3_pipeline

from models.dit.registry import load_dit

CPU = torch.device("cpu")
EQUAL = {"rtol": 0, "atol": 2e-5}
"""Pixels in 0..1. Rows of a larger batch are added up in another order; the largest difference seen is 2.1e-6."""

EULER, STOCHASTIC = "flow_match_euler", "flow_match_euler_stochastic"
ASKS = [
    Ask(prompt="a cat", seed=1, steps=8, guidance=7.0, solver=EULER),
    Ask(prompt="a red circle", negative_prompt="blue", seed=2, steps=3, guidance=3.0, solver=EULER, joins_at=2),
    Ask(prompt="no guidance", seed=3, steps=12, guidance=1.0, solver=EULER, joins_at=1),
    Ask(prompt="noise on every step", seed=4, steps=5, guidance=2.0, solver=STOCHASTIC, joins_at=1),
    Ask(prompt="wide", seed=5, steps=4, guidance=4.0, solver=EULER, size=(48, 16), joins_at=1),
    Ask(prompt="wide too", seed=6, steps=6, guidance=1.0, solver=EULER, size=(48, 16), joins_at=2),
    Ask(prompt="long " * 80, seed=7, steps=2, guidance=5.0, solver=EULER, joins_at=4),
]
KINDS = {
    "with T5": {"has_t5": True},
    "without T5": {"has_t5": False},
    "dynamic shifting": {
        "has_t5": False,
        "use_dynamic_shifting": True,
        "base_image_seq_len": 16,
        "max_image_seq_len": 99,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save(sd3_pipeline(**KINDS[request.param]), tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="module")
def model(folder):
    return load_dit(folder, device=CPU)


@pytest.fixture(scope="module")
def stock(folder):
    has_t5 = (folder / "text_encoder_3").is_dir()
    absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_image(pipeline, ask: Ask) -> torch.Tensor:
    config = {**pipeline.scheduler.config, "stochastic_sampling": ask.solver == STOCHASTIC}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    generator = torch.Generator().manual_seed(ask.seed)
    if ask.solver == STOCHASTIC:
        # The pipeline gives its generator to the first noise only and lets the scheduler draw from torch's own.
        step = pipeline.scheduler.step
        pipeline.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs, generator=generator)
    return pipeline(
        ask.prompt,
        negative_prompt=ask.negative_prompt,
        width=ask.size[0],
        height=ask.size[1],
        guidance_scale=ask.guidance,
        num_inference_steps=ask.steps,
        generator=generator,
        output_type="pt",
    ).images[0]


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: f"seed {ask.seed}")
def test_an_image_alone_equals_the_stock_pipeline(model, stock, ask):
    (image,) = denoise(model, [ask])
    torch.testing.assert_close(image, stock_image(stock, ask), **EQUAL)


def test_images_that_share_forwards_equal_the_stock_pipeline(model, stock):
    for ask, image in zip(ASKS, denoise(model, ASKS)):
        torch.testing.assert_close(image, stock_image(stock, ask), **EQUAL)


def test_another_prompt_gives_another_image(model):
    """Else equality would say nothing."""
    first, second = denoise(model, [Ask(prompt=prompt, seed=1, solver=EULER) for prompt in ("a cat", "a dog")])
    assert (first - second).abs().mean() > 1e-3


def test_a_prompt_does_not_depend_on_those_encoded_with_it(model):
    alone = model.encode(["a cat"])[0]
    together = model.encode(["", "a cat", "something much longer than that"])[1]
    assert alone.num_tokens == together.num_tokens
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(together.tensors[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_model_in_half_precision_computes_and_gives_float32(folder):
    half = load_dit(folder, device=CPU, dtype=torch.bfloat16)
    (image,) = denoise(half, [Ask(prompt="a cat", seed=1, steps=2, solver=EULER)])
    assert half.spec.dtype == torch.bfloat16
    assert image.dtype == torch.float32 and image.isfinite().all()


def test_what_the_model_says_of_itself(model):
    spec = model.spec
    assert (spec.prediction, spec.solvers) == ("flow", (EULER, STOCHASTIC))
    assert (spec.width, spec.height, spec.size_multiple, spec.max_side) == (32, 32, 4, 64)
    assert (spec.num_inference_steps, spec.guidance_scale) == (28, 7.0)
    assert model.latent_shape(48, 16) == (4, 8, 24)
    assert model.num_tokens(48, 16) == 48


def test_prompt_tokens_are_counted_without_padding(model):
    empty, short, long = (row.num_tokens for row in model.encode(["", "cat", "cat " * 300]))
    assert empty < short < 10 < 77 <= long
