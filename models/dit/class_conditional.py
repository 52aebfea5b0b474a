"""Class-conditional diffusion transformers: `DiTPipeline` of diffusers (Peebles and Xie, 2023). The prompt is a class.

A class goes by its number or by any of its names ("white shark"), in any case. The empty prompt is the class of no
class, which guidance leads away from; a negative prompt is another class.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.dit.autoencoder import ImageDecoder
from models.dit.base import Conditioning, DiTSpec, count_parameters
from models.dit.part import Recipe

# Legend: R rows of a forward, B images, C latent channels, H and W latent height and width

_LONGEST_NAME = 200
"""Characters of a prompt that are compared with names; ImageNet's longest is 121."""


class ClassNames:
    """Which class a prompt means."""

    def __init__(self, num_classes: int, id2label: Mapping[str, str]) -> None:
        """`id2label`: number → names, joined by commas."""
        self._num_classes = num_classes
        self._numbers: dict[str, int] = {}
        for number, label in id2label.items():
            for name in (label, *label.split(",")):
                # Of a name that two classes share ("crane") the later has it, as in diffusers; numbers are unique.
                self._numbers[name.strip().lower()] = int(number)

    def number(self, prompt: str) -> int:
        """Raises ValueError with the nearest names for a class that there is not."""
        wanted = prompt.strip().lower()
        if not wanted:
            return self._num_classes
        if wanted in self._numbers:
            return self._numbers[wanted]
        if wanted.isdecimal() and len(wanted) <= 9 and int(wanted) < self._num_classes:
            return int(wanted)
        names = f"a class by its number, 0 to {self._num_classes - 1}" + (", or by its name" if self._numbers else "")
        nearest = difflib.get_close_matches(wanted[:_LONGEST_NAME], self._numbers, n=3)
        hint = f"; nearest are {', '.join(map(repr, nearest))}" if nearest else ""
        raise ValueError(f"the prompt is no class of this model; give {names}{hint}")


class ClassConditionalDiT:
    """A `DiT` over the components of a `DiTPipeline`. Makes one size only: the unpatchifying is square."""

    def __init__(self, pipeline: Any, spec: DiTSpec, id2label: Mapping[str, str]) -> None:
        self.spec = spec
        self._transformer = pipeline.transformer
        self._decoder = ImageDecoder(pipeline.vae)
        self._classes = ClassNames(self._transformer.config.num_embeds_ada_norm, id2label)
        self.num_parameters: int = count_parameters(pipeline.components.values())

    def check_prompt(self, prompt: str) -> None:
        self._classes.number(prompt)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self._decoder.factor
        return self._transformer.config.in_channels, height // factor, width // factor

    def num_tokens(self, width: int, height: int) -> int:
        _, rows, columns = self.latent_shape(width, height)
        patch: int = self._transformer.config.patch_size
        return (rows // patch) * (columns // patch)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        device = self._transformer.device
        return [
            Conditioning({"label": torch.tensor([self._classes.number(prompt)], device=device)}, num_tokens=1)
            for prompt in prompts
        ]

    def predict(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        return _predict(self._transformer, latents_RCHW, times_R, conditioning)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._decoder(latents_BCHW)


@torch.no_grad()
def _predict(transformer: Any, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    labels_R = torch.cat([row.tensors["label"] for row in conditioning])
    latents_RCHW = latents_RCHW.to(transformer.dtype)
    output: Tensor = transformer(latents_RCHW, timestep=times_R, class_labels=labels_R, return_dict=False)[0]
    # Further channels are the variance the model learnt beside, which no solver here asks for.
    return output[:, : latents_RCHW.shape[1]].float()


RECIPE = Recipe(_predict, image="pos_embed", text=None, output="proj_out_2")
"""For several ranks."""
