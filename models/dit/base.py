"""What a diffusion transformer offers to the step loop: encode prompts, predict for a batch of rows, decode latents.

A family is one file beside this one, over the components of its diffusers pipeline. It holds weights and no state of a
request: latents, time and conditioning come in with each call, so rows of one forward may belong to requests at
different steps, with different step counts, guidance and solvers. What must be equal within a forward is the shape.

Latents are float32 whatever the model computes in: a step moves them by a few percents, and bfloat16 keeps two digits,
so over fifty steps the roundings would add up to a visible error. The forward casts them on entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

# Legend: R rows of a forward, B images, C latent channels, H and W latent height and width, P and Q those in pixels


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Conditioning:
    """What one prompt tells the transformer: tensors of one row (leading dimension 1), by names of the family's own.

    Each is only equal to itself, and other ranks keep a copy for as long as it lives.
    """

    tensors: Mapping[str, Tensor]
    num_tokens: int
    """Text tokens of the prompt, padding left out; what usage reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTSpec:
    """A model's constants."""

    prediction: Literal["flow", "epsilon"]
    """What the transformer predicts: the velocity of a straight path from data to noise, or the noise."""
    dtype: torch.dtype
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    """Defaults; width and height in pixels."""
    size_multiple: int
    """Width and height are multiples of this many pixels."""
    max_pixels: int
    solvers: tuple[str, ...]
    """Names in `serve/image/solver.py`; the first is the checkpoint's own."""
    solver_config: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint's `scheduler_config.json`."""
    sizes: tuple[tuple[int, int], ...] = ()
    """The only (width, height) there are; empty: any within the limits above."""
    max_side: int = 0
    """The longest width or height in pixels that the table of positions holds; 0: only `max_pixels` counts."""


class DiT(Protocol):
    """A diffusion transformer with its text encoders and VAE. Not thread-safe; computes on its own device."""

    @property
    def spec(self) -> DiTSpec: ...

    @property
    def num_parameters(self) -> int: ...

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError, with the remedy, for a prompt that cannot be encoded (an unknown class). Any thread."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, H, W) of an image of that size in pixels."""
        ...

    def num_tokens(self, width: int, height: int) -> int:
        """Latent tokens (patches) of one row: the unit of work."""
        ...

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """One each, in one pass of the text encoders. The empty prompt is the unconditional one."""
        ...

    def predict(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The prediction for every row, float32, in one forward of the transformer.

        `times_R` is float32 in the units of the solver's schedule (diffusers' timesteps, 0 to 1000).
        """
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, P, Q) in 0..1, float32, of finished latents of one shape."""
        ...


def count_parameters(components: Iterable[object]) -> int:
    """Of all networks among a pipeline's components."""
    networks = [component for component in components if isinstance(component, nn.Module)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())
