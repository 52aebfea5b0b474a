"""`tandem-image` as it ships: diffusers' layout, small, and it draws what it was never shown."""

import json
import random
from functools import cache

import pytest
import torch

from models.embedded.captions import plain_prompt
from models.embedded.evaluate_image import IMAGE, defaults, generate, load_pipeline, share_right
from models.embedded.image_autoencoder import decode, encode
from models.embedded.paths import EMBEDDED
from models.embedded.picture_reader import read_picture
from models.embedded.pictures import COMBINATIONS, Combination, combinations, draw, random_picture
from models.embedded.train_image import DEFAULTS

HELD_OUT = combinations("held_out")


@cache
def load():
    torch.set_num_threads(1)
    return load_pipeline()


def pictures(asked, **changed):
    usual = {name: defaults()[name] for name in ("num_inference_steps", "guidance_scale", "max_sequence_length")}
    return generate(load(), [plain_prompt(combination) for combination in asked], **usual | changed)


def test_files_are_the_layout_of_diffusers():
    index = json.loads((IMAGE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert {file.name for file in IMAGE.iterdir()} >= {"README.md", "LICENSE", "tandem.json", "transformer", "vae"}
    assert (IMAGE / "LICENSE").read_bytes() == (EMBEDDED["tandem-text"] / "LICENSE").read_bytes()
    assert defaults() == DEFAULTS


def test_it_is_at_most_eight_megabytes():
    assert sum(file.stat().st_size for file in IMAGE.rglob("*") if file.is_file()) <= 8e6


def test_every_part_computes_in_float32_when_no_dtype_is_named():
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(load(), part).dtype == torch.float32
    assert load().default_sample_size * load().vae_scale_factor == DEFAULTS["width"] == DEFAULTS["height"]


def test_autoencoder_keeps_every_combination():
    rng = random.Random(0)
    drawn = [random_picture(combination, 64, 64, rng, size=None, place=None) for combination in COMBINATIONS]
    with torch.no_grad():
        images = decode(load().vae, encode(load().vae, draw(drawn, 64, 64)))
    assert share_right(images, COMBINATIONS) == 1.0


def test_held_out_combinations_are_drawn_right():
    asked = HELD_OUT * 2
    assert share_right(pictures(asked, seed=100), asked) >= 0.9


@pytest.mark.parametrize(("width", "height"), [size for size in DEFAULTS["sizes"] if size != [64, 64]])
def test_other_sizes_are_drawn_right(width, height):
    asked = HELD_OUT[::2]
    images = pictures(asked, width=width, height=height, seed=200)
    assert images.shape[-2:] == (height, width)
    assert share_right(images, asked) >= 0.8


def test_it_is_right_with_as_many_rows_of_zeros_as_the_stock_pipeline_appends():
    asked = HELD_OUT[::3]
    assert share_right(pictures(asked, seed=300, max_sequence_length=256), asked) >= 0.85


def test_the_prompt_decides_size_and_place():
    prompts = [
        "a small red circle in the top left corner on a white background",
        "a small red circle in the bottom right corner on a white background",
        "a large red circle on a white background",
    ]
    usual = {name: defaults()[name] for name in ("num_inference_steps", "guidance_scale")}
    first, second, third = (read_picture(image) for image in generate(load(), prompts, **usual))
    assert (first.place, second.place, third.place) == ("top left", "bottom right", "center")
    assert first.radius < 0.22 < 0.3 < third.radius


def test_without_guidance_and_prompt_it_draws_some_picture():
    images = generate(load(), [""] * 8, num_inference_steps=defaults()["num_inference_steps"], guidance_scale=1.0)
    readings = [read_picture(image) for image in images]
    assert len({(reading.colour, reading.background) for reading in readings}) >= 4


def test_an_unknown_word_does_no_harm():
    prompt = ["a nice blue square on a white background"]
    usual = {name: defaults()[name] for name in ("num_inference_steps", "guidance_scale")}
    blue_square = Combination(shape="square", colour="blue", background="white")
    assert read_picture(generate(load(), prompt, **usual)[0]).shows(blue_square)
