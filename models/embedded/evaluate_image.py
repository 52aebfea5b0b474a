"""How often `tandem-image` draws what was asked: `python -m models.embedded.evaluate_image`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from models.embedded.captions import plain_prompt
from models.embedded.paths import FOLDER
from models.embedded.picture_reader import read_picture
from models.embedded.pictures import Combination, combinations

IMAGE = FOLDER / "tandem-image"


def load_pipeline(folder: Path = IMAGE) -> Any:
    """The stock pipeline. diffusers wants to be told of absent parts even where `model_index.json` says so."""
    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    height: int = 64,
    width: int = 64,
    seed: int = 0,
    max_sequence_length: int = 1,
) -> Tensor:
    """Images [B, 3, H, W] in 0..1, in one batch; the noise of each is its own, whatever the others are."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        max_sequence_length=max_sequence_length,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))],
        output_type="pt",
    ).images.cpu()


def share_right(images: Tensor, asked: Sequence[Combination]) -> float:
    """Share of images that show shape, colour and background as asked."""
    right = [read_picture(image).shows(combination) for image, combination in zip(images, asked, strict=True)]
    return sum(right) / len(right)


def defaults(folder: Path = IMAGE) -> dict[str, Any]:
    """Recommended steps, guidance and size, which the standard layout has no place for."""
    return json.loads((folder / "tandem.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=IMAGE)
    parser.add_argument("--seeds", type=int, default=5, help="pictures of each combination")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument(
        "--null-rows", type=int, default=1, help="rows of zeros behind the prompt (max_sequence_length)"
    )
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.folder)
    settings = defaults(arguments.folder)
    for width, height in settings["sizes"]:
        for split in ("held_out", "train"):
            asked = combinations(split)[:: 1 if split == "held_out" else 5] * arguments.seeds
            images = generate(
                pipeline,
                [plain_prompt(combination) for combination in asked],
                num_inference_steps=arguments.steps or settings["num_inference_steps"],
                guidance_scale=arguments.guidance or settings["guidance_scale"],
                height=height,
                width=width,
                max_sequence_length=arguments.null_rows,
            )
            print(f"{width}x{height} {split}: {share_right(images, asked):.3f} of {len(asked)}", flush=True)


if __name__ == "__main__":
    main()
