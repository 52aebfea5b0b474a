"""A peer's side of a diffusion transformer on several ranks: its part of the weights, and the prompts it was sent."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch

from models.dit.base import Conditioning
from models.dit.checkpoint import DiTError
from models.dit.grid import Grid, Split
from models.dit.part import Part
from models.dit.registry import load_part
from serve.devices import device_name
from serve.errors import ConfigError
from serve.image.forward import Forward, NewPrompt
from serve.ranks.spec import PeerSpec

# Legend: R rows of a forward, C latent channels, H and W latent height and width


class ImageWorker:
    """A `Worker`."""

    def __init__(self, spec: PeerSpec):
        self._rank = spec.rank
        self._device = torch.device(spec.device)
        self._part: Part | None = None
        self._prompts: dict[int, Conditioning] = {}

    def load(self, folder: str, split: dict[str, int], dtype: str | None, load_format: str) -> dict[str, Any]:
        """Join the groups of the split and load this rank's part. Raises ConfigError."""
        grid = Grid.join(Split(**split), self._rank)
        try:
            self._part = load_part(
                Path(folder),
                grid,
                device=self._device,
                dtype=None if dtype is None else getattr(torch, dtype),
                load_format=load_format,
            )
        except (DiTError, OSError) as error:
            raise ConfigError(f"model: {error}", param="model") from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ConfigError(
                f"the weights of rank {self._rank} do not fit the memory of {self._device}", param="model"
            ) from error
        device = device_name(str(self._device))
        return {"device": device, "weight_bytes": self._part.weight_bytes, "bytes_read": self._part.bytes_read}

    def set_threads(self, threads: int) -> None:
        """Of this rank, once the model's size is known."""
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def run(self, payload: memoryview) -> None:
        part = self._part
        assert part is not None, "load comes first"
        forward = Forward.from_bytes(payload)
        for number in forward.forgotten:
            del self._prompts[number]
        for prompt in forward.new:
            self._prompts[prompt.number] = self._receive(part, prompt)
        num_rows = len(forward.prompts)
        packed = torch.empty(num_rows * (prod(forward.latent_shape) + 1), device=self._device)
        part.grid.broadcast_(packed)
        latents_RCHW = packed[:-num_rows].view(num_rows, *forward.latent_shape)
        part.predict(latents_RCHW, packed[-num_rows:], [self._prompts[number] for number in forward.prompts])

    def _receive(self, part: Part, prompt: NewPrompt) -> Conditioning:
        tensors = {
            name: part.grid.broadcast_(torch.empty(shape, dtype=getattr(torch, dtype), device=self._device))
            for name, (dtype, shape) in prompt.tensors.items()
        }
        return Conditioning(tensors, num_tokens=0)
