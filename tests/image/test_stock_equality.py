"""The engine's images against diffusers' own pipelines: same files, same seed, whoever shares the steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, StableDiffusion3Pipeline
from image_engine import ImageEngine, job, make_engine
from tiny_pipelines import dit_pipeline, save, sd3_pipeline

from models.dit.registry import load_dit
from serve.image.runner import ImageRunner
from serve.image.trajectory import ImageBatch, Stage

CPU = torch.device("cpu")
CLOSE = {"rtol": 0, "atol": 1e-4}
"""Pixels in 0..1, before they become bytes. A forward of other rows adds up in another order."""

DIT = [
    {"prompt": "goldfish", "num_steps": 8, "guidance_scale": 4.0, "seed": 1},
    {"prompt": "7", "num_steps": 3, "guidance_scale": 1.0, "seed": 2},
    {"prompt": "white shark", "num_steps": 12, "guidance_scale": 1.5, "seed": 3},
    {"prompt": "999", "num_steps": 5, "guidance_scale": 7.0, "seed": 4, "num_previews": 2},
    {"prompt": "cock", "num_steps": 6, "guidance_scale": 3.0, "seed": 2**40},
]
SD3 = [
    {"prompt": "a cat", "num_steps": 8, "guidance_scale": 7.0, "seed": 1},
    {"prompt": "a red circle", "negative_prompt": "blue", "num_steps": 3, "guidance_scale": 3.0, "seed": 2},
    {"prompt": "no guidance", "num_steps": 12, "guidance_scale": 1.0, "seed": 3, "num_previews": 3},
    {"prompt": "wide", "num_steps": 4, "guidance_scale": 4.0, "seed": 5, "width": 48, "height": 16},
    {"prompt": "wide too", "num_steps": 6, "guidance_scale": 1.0, "seed": 6, "width": 48, "height": 16},
    {"prompt": "long " * 80, "num_steps": 2, "guidance_scale": 5.0, "seed": 7},
]


class Family:
    """A model, its stock pipeline, and what is asked of both."""

    def __init__(self, folder: Path, stock: Any, asks: list[dict[str, Any]]):
        self.model = load_dit(folder, device=CPU)
        self.asks = [{"width": 32, "height": 32, "solver": self.model.spec.solvers[0], **ask} for ask in asks]
        stock.set_progress_bar_config(disable=True)
        self.images = [self._stock_image(stock, ask) for ask in self.asks]

    @staticmethod
    def _stock_image(pipeline: Any, ask: dict[str, Any]) -> torch.Tensor:
        arguments = {
            "guidance_scale": ask["guidance_scale"],
            "num_inference_steps": ask["num_steps"],
            "generator": torch.Generator().manual_seed(ask["seed"]),
            "output_type": "pt",
        }
        if isinstance(pipeline, DiTPipeline):
            name = ask["prompt"]
            label = int(name) if name.isdigit() else pipeline.get_label_ids([name])[0]
            return pipeline(class_labels=[label], **arguments).images[0]
        size = {"width": ask["width"], "height": ask["height"]}
        return pipeline(ask["prompt"], negative_prompt=ask.get("negative_prompt", ""), **size, **arguments).images[0]


@pytest.fixture(scope="module", params=["class-conditional", "text to image"])
def family(request, tmp_path_factory) -> Family:
    if request.param == "class-conditional":
        folder = save(dit_pipeline(), tmp_path_factory.mktemp("models") / "dit")
        return Family(folder, DiTPipeline.from_pretrained(folder), DIT)
    folder = save(sd3_pipeline(), tmp_path_factory.mktemp("models") / "sd3")
    return Family(folder, StableDiffusion3Pipeline.from_pretrained(folder), SD3)


class Watched:
    """An engine over the family's model, and the finished images as the VAE gave them."""

    def __init__(self, family: Family, **settings: Any):
        self.engine: ImageEngine
        self.engine, self.runner = make_engine(family.model, **settings)
        self.images: dict[str, torch.Tensor] = {}
        self.num_rows: list[int] = []
        submit, decode = self.runner.submit, family.model.decode
        decoded: list[torch.Tensor] = []

        def watched_decode(latents: torch.Tensor) -> torch.Tensor:
            decoded.append(decode(latents))
            return decoded[-1]

        def watched_submit(batch: ImageBatch) -> Any:
            self.runner.model.decode = watched_decode
            handle = submit(batch)
            self.runner.model.decode = decode
            if batch.kind is Stage.DECODE:
                for row, image in zip(batch.rows, decoded.pop()):
                    if not row.is_preview:
                        self.images[row.job.id] = image
            elif batch.kind is Stage.DENOISE:
                self.num_rows.append(batch.num_rows)
            return handle

        self.runner.submit = watched_submit  # type: ignore[method-assign]


def test_an_image_alone_equals_the_stock_pipeline(family: Family) -> None:
    for ask, expected in zip(family.asks, family.images):
        watched = Watched(family)
        watched.engine.submit(job("it", **ask))
        while watched.engine.step():
            watched.engine.check_health()
        torch.testing.assert_close(watched.images["it"], expected, **CLOSE)


@pytest.mark.parametrize("number", range(8))
def test_images_in_mixed_batches_with_random_joins_equal_the_stock_pipeline(family: Family, number: int) -> None:
    dice = random.Random(number)
    cap = dice.choice([100, 400, 10_000])
    watched = Watched(family, max_num_images=dice.choice([3, 16]), cap=cap, depth=dice.choice([0, 1, 3]))
    arrivals = [(dice.randrange(12), i, index) for i, index in enumerate(dice.choices(range(len(family.asks)), k=9))]
    step = 0
    while step < 12 or watched.engine.step():
        for at, i, index in arrivals:
            if at == step:
                watched.engine.submit(job(f"{i}", **family.asks[index]))
        if step < 12:
            watched.engine.step()
        watched.engine.check_health()
        step += 1
    largest = 0.0
    for _, i, index in arrivals:
        torch.testing.assert_close(watched.images[f"{i}"], family.images[index], **CLOSE)
        largest = max(largest, float((watched.images[f"{i}"] - family.images[index]).abs().max()))
    print(f"\nlargest difference {largest:.1e}, rows per forward {sum(watched.num_rows) / len(watched.num_rows):.1f}")


def test_eight_requests_share_forwards_at_six_rows_and_more(family: Family) -> None:
    watched = Watched(family)
    size = {key: family.asks[0][key] for key in ("width", "height", "prompt")}
    solvers = family.model.spec.solvers
    for i in range(8):
        guidance = (1.0, 3.0)[i % 2]
        values = {**size, "num_steps": 8 + i, "guidance_scale": guidance, "solver": solvers[i % len(solvers)]}
        watched.engine.submit(job(f"{i}", seed=i, **values))
    while watched.engine.step():
        watched.engine.check_health()
    mean = sum(watched.num_rows) / len(watched.num_rows)
    print(f"\nrows per forward: {mean:.2f} in {len(watched.num_rows)} forwards")
    assert mean >= 6 and isinstance(watched.runner, ImageRunner)
