"""One forward of the transformer as the driver tells it to the other ranks. The tensors follow by broadcast, in order:
those of new prompts, then latents and times in one.

Prompts go by numbers: what a prompt tells the transformer is sent once and kept until the driver has forgotten it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NewPrompt:
    """Tensors that the other ranks have not seen yet."""

    number: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name → dtype and shape."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What is computed: a row for each prompt."""

    latent_shape: tuple[int, ...]
    """Of a row."""
    prompts: list[int]
    new: list[NewPrompt]
    forgotten: list[int]

    def to_bytes(self) -> bytes:
        new = [[prompt.number, prompt.tensors] for prompt in self.new]
        return json.dumps([self.latent_shape, self.prompts, new, self.forgotten]).encode()

    @classmethod
    def from_bytes(cls, payload: bytes | memoryview) -> Forward:
        shape, prompts, new, forgotten = json.loads(bytes(payload))
        return cls(
            tuple(shape),
            prompts,
            [
                NewPrompt(number, {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()})
                for number, tensors in new
            ],
            forgotten,
        )
