"""The pictures and prompts that `tandem-image` learns from, and the judge of what it draws."""

import random

import pytest
import torch

from models.embedded.captions import every_word, plain_prompt, random_ask, random_prompt
from models.embedded.image_rows import LatentPool
from models.embedded.picture_reader import read_picture
from models.embedded.pictures import (
    COLOURS,
    COMBINATIONS,
    PLACES,
    SHAPES,
    SIZES,
    combinations,
    draw,
    random_picture,
    with_random_colours,
)

torch.set_num_threads(1)  # many small tensors

ALL_SIZES = [(64, 64), (48, 48), (96, 64), (64, 96), (96, 96)]
HELD_OUT, TRAIN = combinations("held_out"), combinations("train")


def test_each_combination_is_on_one_side():
    assert not set(HELD_OUT) & set(TRAIN)
    assert set(HELD_OUT) | set(TRAIN) == set(COMBINATIONS)


def test_about_a_tenth_is_held_out():
    assert 0.07 <= len(HELD_OUT) / len(COMBINATIONS) <= 0.13


def test_every_shape_colour_and_background_is_on_both_sides():
    for side in (HELD_OUT, TRAIN):
        assert {combination.shape for combination in side} == set(SHAPES)
        assert {combination.background for combination in side} == {"white", "black", "gray"}
    assert {combination.colour for combination in TRAIN} == set(COLOURS)
    assert len({combination.colour for combination in HELD_OUT}) >= 9


class _Encoder:
    """Stands for the autoencoder: its latents say what was drawn."""

    class config:
        shift_factor, scaling_factor = 0.0, 1.0

    def encode(self, images):
        self.images = images
        return self

    @property
    def latent_dist(self):
        return self

    def mode(self):
        return torch.zeros(len(self.images), 8, self.images.shape[2] // 4, self.images.shape[3] // 4)


def test_training_rows_are_never_held_out():
    pool = LatentPool(_Encoder(), 48, 48)
    for step in range(50):
        _, rows = pool.batch(64, random.Random(step))
        assert {row.combination.split for row in rows} == {"train"}


@pytest.mark.parametrize(("height", "width"), ALL_SIZES)
def test_reader_is_right_on_every_clean_drawing(height, width):
    rng = random.Random(height * width)
    for combination in COMBINATIONS if (height, width) == (64, 64) else COMBINATIONS[::3]:
        for size in (None, *SIZES):
            place = rng.choice((None, *PLACES))
            picture = random_picture(combination, height, width, rng, size=size, place=place)
            reading = read_picture(draw([picture], height, width)[0])
            assert reading.shows(combination), (combination, size, place)
            assert place is None or reading.place == place
            if size == "small":
                assert reading.radius < 0.2
            elif size == "large" and place in (None, "center"):
                assert reading.radius > 0.3


def test_reader_names_nothing_it_does_not_see():
    blank = read_picture(torch.ones(3, 64, 64))
    assert (blank.shape, blank.colour, blank.background) == (None, None, "white")
    noise = read_picture(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert noise.shape is None
    two_shapes = torch.ones(3, 64, 64)
    two_shapes[:, 5:20, 5:20] = two_shapes[:, 40:60, 40:60] = 0
    assert read_picture(two_shapes).shape is None


def test_reader_is_not_fooled_by_a_colour_between_names():
    picture = random_picture(COMBINATIONS[0], 64, 64, random.Random(0), size=None, place=None)
    readings = {
        read_picture(draw([with_random_colours(picture, random.Random(i))], 64, 64)[0]).colour for i in range(40)
    }
    assert None in readings


def test_drawings_keep_a_margin():
    rng = random.Random(7)
    for _ in range(500):
        combination, ask = rng.choice(COMBINATIONS), random_ask(rng)
        height, width = rng.choice(ALL_SIZES)
        image = draw([random_picture(combination, height, width, rng, size=ask.size, place=ask.place)], height, width)[
            0
        ]
        paper = image[:, 0, 0]
        for border in (image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]):
            assert torch.equal(border, paper[:, None].expand_as(border))


def test_prompts_use_known_words_and_say_what_is_asked():
    rng = random.Random(3)
    known = {*every_word(), *COLOURS, *SHAPES, "a", "an"}
    for _ in range(2000):
        combination, ask = rng.choice(TRAIN), random_ask(rng)
        words = random_prompt(combination, ask, rng).replace(",", "").split()
        assert sum(word not in known for word in words) <= 1  # at most one that is not to be heeded
        if ask.place and ask.place != "center":
            assert set(ask.place.split()) <= set(words)


def test_plain_prompt():
    assert (
        plain_prompt(next(c for c in COMBINATIONS if c.colour == "orange")) == "an orange circle on a white background"
    )
