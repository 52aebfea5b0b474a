"""What the denoiser learns from: latents of drawings from combinations that are not held out, with their prompts."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from models.embedded.captions import Ask, random_ask, random_prompt
from models.embedded.image_autoencoder import CHANNELS, FACTOR, encode
from models.embedded.pictures import Combination, combinations, draw, random_picture

# Legend: B pictures, T prompt tokens

TRAINED_SIZES = {(64, 64): 0.5, (48, 48): 0.26, (96, 64): 0.09, (64, 96): 0.09, (96, 96): 0.06}
"""Height and width in pixels, and the share of steps."""
NULL_ROWS = {1: 0.5, 16: 0.1, 77: 0.1, 256: 0.3}
"""Rows of zeros behind the prompt, and the share of steps: one is enough, 256 is what the stock pipeline appends."""
NO_PROMPT = 0.1
"""Share of prompts that are emptied, for classifier-free guidance."""
POOL, FRESH = 4096, 0.25
"""Latents kept of each size, and the share of a batch that is drawn anew; encoding costs a fifth of a training step."""


@dataclass(frozen=True, slots=True)
class Row:
    combination: Combination
    ask: Ask


class LatentPool:
    """Encoded drawings of one size. A batch adds some, which replace the oldest, and draws from all."""

    def __init__(self, autoencoder: Any, height: int, width: int) -> None:
        self._autoencoder = autoencoder
        self._height, self._width = height, width
        self._rows: list[Row] = []
        self._latents = torch.empty(POOL, CHANNELS, height // FACTOR, width // FACTOR)
        self._added = 0
        self._combinations = combinations("train")

    def batch(self, num_rows: int, rng: random.Random) -> tuple[Tensor, list[Row]]:
        self._add(max(1, round(FRESH * num_rows)) if self._rows else 4 * num_rows, rng)
        picked = [rng.randrange(len(self._rows)) for _ in range(num_rows)]
        return self._latents[picked], [self._rows[index] for index in picked]

    def _add(self, num_rows: int, rng: random.Random) -> None:
        rows = [Row(rng.choice(self._combinations), random_ask(rng)) for _ in range(num_rows)]
        pictures = [
            random_picture(row.combination, self._height, self._width, rng, size=row.ask.size, place=row.ask.place)
            for row in rows
        ]
        latents = encode(self._autoencoder, draw(pictures, self._height, self._width))
        for row, latent in zip(rows, latents, strict=True):
            index = self._added % POOL
            self._rows[index : index + 1] = [row]
            self._latents[index] = latent
            self._added += 1


def prompt_tokens(prompts: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids [B, T], padded as the pipeline pads."""
    return tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def training_prompt(row: Row, rng: random.Random) -> str:
    return "" if rng.random() < NO_PROMPT else random_prompt(row.combination, row.ask, rng)
