"""Images of an engine whose transformer is shared by ranks: those of one rank, whatever is split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_engine import ImageEngine, drain, job, pixels
from serving import eventually

from serve.engine.interface import DeviceFault
from serve.errors import EngineDead
from serve.image.build import build_engine
from serve.image.ranked import RankedDiT
from serve.image.runner import ImageRunner
from serve.options import ModelOptions
from serve.request import ModelCard

EMBEDDED = Path(__file__).resolve().parent.parent.parent / "models" / "embedded" / "tandem-image"
FILE = "diffusion_pytorch_model.safetensors"
ASKS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "num_steps": 6, "guidance_scale": 4.0, "seed": 1, "num_previews": 1},
    {"prompt": "a blue square", "num_steps": 3, "guidance_scale": 1.0, "seed": 2},
    {"prompt": "a green triangle", "negative_prompt": "red", "num_steps": 4, "guidance_scale": 2.0, "seed": 3},
    {"prompt": "a red circle", "num_steps": 2, "seed": 4, "width": 96},
    {"prompt": "noise", "num_steps": 3, "seed": 5, "solver": "flow_match_euler_stochastic"},
]
"""Rows of one forward: five at first, then as few as one, and of two sizes."""


def options(**sizes: int) -> ModelOptions:
    return ModelOptions(model=str(EMBEDDED), device="cpu", threads=1, **sizes)


def images(engine: ImageEngine) -> list[np.ndarray]:
    streams = [engine.submit(job(f"{i}", **{"width": 64, "height": 64} | ask)) for i, ask in enumerate(ASKS)]
    drain(engine)
    return [picture for stream in streams for picture in pixels(stream)]


@pytest.fixture(scope="module")
def alone() -> tuple[list[np.ndarray], ModelCard]:
    engine, card, _ = build_engine(options())
    assert card.ranks == ()
    return images(engine), card


@pytest.fixture(scope="module", params=["tensor_parallel_size", "cfg_parallel_size", "ulysses_degree"])
def shared(request) -> Iterator[tuple[ImageEngine, ModelCard, list[BaseException]]]:
    """The engine, its card, and what ended it."""
    causes: list[BaseException] = []
    engine, card, _ = build_engine(options(**{request.param: 2}), on_death=causes.append)
    yield engine, card, causes
    ranked(engine).group.close()


def ranked(engine: ImageEngine) -> RankedDiT:
    runner = engine._runner
    assert isinstance(runner, ImageRunner) and isinstance(runner.model, RankedDiT)
    return runner.model


def test_images_equal_those_of_one_rank_and_come_again_the_same(shared, alone):
    engine, _, _ = shared
    first, second = images(engine), images(engine)
    assert len(first) == len(alone[0]) == len(ASKS) + 1
    for picture, expected in zip(first, alone[0]):
        assert np.abs(picture - expected).max() <= 1.01 / 255
    assert all(np.array_equal(picture, other) for picture, other in zip(first, second))
    engine._runner.check()


def test_the_card_tells_of_the_whole_model_and_of_every_rank(shared, alone):
    _, card, _ = shared
    assert card.num_parameters == alone[1].num_parameters
    driver, peer = card.ranks
    assert (driver.rank, driver.device, peer.rank, peer.device) == (0, "cpu", 1, "cpu")
    assert 0 < peer.weight_bytes < driver.weight_bytes <= 4 * card.num_parameters
    assert peer.bytes_read == driver.bytes_read <= (EMBEDDED / "transformer" / FILE).stat().st_size


def test_a_peer_that_is_killed_ends_the_engine_which_says_so(shared):
    engine, _, causes = shared
    engine.submit(job("it", width=64, height=64))
    for _ in range(3):
        engine.step()
    ranked(engine).group._processes[1].kill()
    drain(engine)
    with pytest.raises(EngineDead):
        engine.check_health()
    eventually(lambda: {type(cause) for cause in causes} == {DeviceFault, EngineDead})  # the engine's, the group's
    assert all(re.search(r"rank 1 \(pid \d+\) failed: killed by SIGKILL", str(cause)) for cause in causes)
