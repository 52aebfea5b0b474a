"""The smallest diffusion transformer: a few hundred weights, every input of a row changes its output, no row another's.

The text is encoded as hashed characters, the empty prompt has an encoding of its own. A prompt with "poison" in it
breaks every pass it takes part in; one with "nan" is computed, but not to numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from models.dit.base import Conditioning, DiTSpec

SPEC = DiTSpec(
    prediction="flow",
    dtype=torch.float32,
    width=16,
    height=16,
    num_inference_steps=6,
    guidance_scale=4.0,
    size_multiple=4,
    max_pixels=64 * 64,
    solvers=("flow_match_euler", "flow_match_euler_stochastic"),
    solver_config={"shift": 3.0},
)
WIDTH = 16


class FakeDiT:
    """A `DiT` of two layers. `calls` remembers the rows of every forward of the transformer."""

    def __init__(self, **spec: Any):
        self.spec = replace(SPEC, **spec)
        if self.spec.prediction == "epsilon":
            self.spec = replace(self.spec, solvers=("ddim", "euler", "euler_ancestral"), solver_config={})
        generator = torch.Generator().manual_seed(0)
        self._in, self._mix, self._out = (
            torch.randn(shape, generator=generator) * 0.3 for shape in ((4, WIDTH), (WIDTH, WIDTH), (WIDTH, 4))
        )
        self._to_rgb = torch.randn((4, 3), generator=generator)
        self.calls: list[int] = []
        self.encoded: list[list[str]] = []
        self.decoded: list[Tensor] = []

    @property
    def num_parameters(self) -> int:
        return 8 * WIDTH + WIDTH * WIDTH + 12

    def check_prompt(self, prompt: str) -> None:
        if prompt == "unknown":
            raise ValueError("there is no class 'unknown'; did you mean 'known'?")

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 4, height // 2, width // 2

    def num_tokens(self, width: int, height: int) -> int:
        return (height // 4) * (width // 4)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        self.encoded.append(list(prompts))
        if any("poison" in prompt for prompt in prompts):
            raise RuntimeError("the text encoder breaks")
        return [Conditioning({"text": self._text(prompt)}, len(prompt.split())) for prompt in prompts]

    def predict(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        self.calls.append(len(conditioning))
        text_RD = torch.cat([row.tensors["text"] for row in conditioning])
        time_RD = torch.sin(times_R[:, None] / 1000 * torch.arange(1, WIDTH + 1))
        hidden = torch.einsum("rchw,cd->rhwd", latents_RCHW, self._in) + (text_RD + time_RD)[:, None, None]
        mixed = torch.tanh(hidden @ self._mix) + hidden.tanh().mean((1, 2), keepdim=True)
        return torch.einsum("rhwd,dc->rchw", mixed, self._out)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        self.decoded.append(latents_BCHW)
        rgb = torch.einsum("bchw,cd->bdhw", latents_BCHW, self._to_rgb)
        return torch.sigmoid(rgb.repeat_interleave(2, 2).repeat_interleave(2, 3))

    @staticmethod
    def _text(prompt: str) -> Tensor:
        if "nan" in prompt:
            return torch.full((1, WIDTH), float("nan"))
        generator = torch.Generator().manual_seed(crc32(prompt.encode()))
        return torch.randn((1, WIDTH), generator=generator)
