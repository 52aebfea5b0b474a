"""Seconds predicted from measured steps of images."""

from __future__ import annotations

import pytest

from serve.backend import Load
from serve.image.pace import MEMORY, ImagePace
from serve.image.trajectory import ImageBatch, Row, Stage, Trajectory

TOKEN_S = 1e-5


def num_tokens(width: int, height: int) -> int:
    return width * height // 256


def trajectory(side: int) -> Trajectory:
    job = Trajectory(id="t", prompt="x", width=side, height=side, num_steps=10, guidance_scale=4.0, solver="", seed=0)
    job.num_tokens = num_tokens(side, side)
    return job


def batch(kind: Stage, *sides: int) -> ImageBatch:
    return ImageBatch(0, kind, [Row(trajectory(side), 0, 0, 0) for side in sides])


@pytest.fixture
def pace() -> ImagePace:
    pace = ImagePace(num_tokens)
    for _ in range(4 * MEMORY):
        for sides in ((256, 256), (1024,)):
            denoise = batch(Stage.DENOISE, *sides)
            pace.on_step(denoise, denoise.num_tokens * TOKEN_S)
    return pace


def test_a_large_image_owes_its_share_of_seconds(pace):
    small, large = (pace.cost_s(trajectory(side)) for side in (256, 1024))
    assert large == pytest.approx(16 * small) == pytest.approx(10 * 2 * 4096 * TOKEN_S, rel=0.01)


def test_a_load_is_told_in_seconds_and_in_the_gateways_unit(pace):
    load = pace.predict(Load(running=1, tokens_owed=4096))
    assert load.backlog_s == pytest.approx(4096 * TOKEN_S, rel=0.01)
    assert load.unit_s * 1024**2 == pytest.approx(4096 * TOKEN_S, rel=0.01)


def test_what_is_around_the_steps_counts_once_an_image(pace):
    for _ in range(8 * MEMORY):
        pace.on_step(batch(Stage.DECODE, 256, 256), 1.0)
    assert pace.predict(Load(running=2, waiting=1)).backlog_s == pytest.approx(3 * 0.5, rel=0.01)
