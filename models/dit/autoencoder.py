"""From finished latents to pixels with a VAE of diffusers, and what its geometry says about sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Legend: B images, C latent channels, H and W latent height and width, P and Q those in pixels


class ImageDecoder:
    """The decoding half of an `AutoencoderKL` of diffusers."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._scale: float = vae.config.scaling_factor
        self._shift: float = vae.config.shift_factor or 0.0
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        """Pixels per latent element, each way."""

    @torch.no_grad()
    def __call__(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, P, Q) in 0..1, float32."""
        latents_BCHW = latents_BCHW / self._scale + self._shift
        images_BCPQ: Tensor = self._vae.decode(latents_BCHW.to(self._vae.dtype), return_dict=False)[0]
        return (images_BCPQ.float() / 2 + 0.5).clamp(0, 1)
