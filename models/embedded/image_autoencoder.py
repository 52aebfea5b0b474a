"""The autoencoder of `tandem-image` and how it is trained: the first of the two stages.

Four by four pixels become one latent of eight numbers: flat colours and one edge fit in that with room to spare, and an
autoencoder that carries colours well is what the transformer's colours depend on. It sees drawings in any colours, not
only the named ones.
"""

import random
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.embedded.pictures import COMBINATIONS, PLACES, SIZES, draw, random_picture, with_random_colours

# Legend: B pictures, C latent channels

FACTOR = 4
"""Pixels along one side of a latent."""
CHANNELS = 8
KL_WEIGHT = 1e-3
"""Of the mean over latents, beside errors per pixel: gives noise of about a twentieth of the latents' own spread."""
ENCODER_SHARE = 0.65
"""Of the budget; after it only the decoder learns, which is cheaper, and from noisier latents."""
DECODER_NOISE = 0.35
"""Largest noise then, about a fifth of the latents' spread: the decoder forgives small errors of the transformer."""
PEAK_RATE = 2e-3
SMALL, USUAL = 32, 64
"""Most steps see pictures of half the usual side, at a quarter of the cost."""
ROWS = 16


def build_autoencoder() -> Any:
    """The architecture, with random weights and the scale not yet measured."""
    return AutoencoderKL(
        sample_size=USUAL,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def autoencoder_loss(autoencoder: Any, images_B3HW: Tensor, share: float) -> tuple[Tensor, dict[str, float]]:
    """Absolute and squared error per pixel, with the weighted divergence while the encoder learns; and what to show."""
    is_frozen = share >= ENCODER_SHARE
    with torch.set_grad_enabled(not is_frozen):
        posterior = autoencoder.encode(images_B3HW).latent_dist
    if is_frozen:
        scale_B111 = DECODER_NOISE * torch.rand(len(images_B3HW), 1, 1, 1, device=images_B3HW.device)
        latents, divergence = posterior.mean + scale_B111 * torch.randn_like(posterior.mean), torch.zeros(())
    else:
        latents = posterior.sample()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
    error = autoencoder.decode(latents).sample.float() - images_B3HW
    absolute, squared = error.abs().mean(), error.square().mean()
    shown = {"absolute": absolute.item(), "noise": posterior.std.float().mean().item()}
    return absolute + 4 * squared + KL_WEIGHT * divergence.to(error.device), shown


def autoencoder_images(rng: random.Random, share: float) -> Tensor:
    """One batch of drawings in -1..1: whole pictures of half the usual side, or pieces of larger ones. In the last
    fifth of the budget a third of the batches have the usual side."""
    side = USUAL if share > 0.8 and rng.random() < 1 / 3 else SMALL
    pictures = []
    for _ in range(ROWS):
        size, place = rng.choice((None, *SIZES)), rng.choice((None, *PLACES))
        picture = random_picture(rng.choice(COMBINATIONS), side, side, rng, size=size, place=place)
        if side == SMALL and rng.random() < 0.5:
            x, y = rng.uniform(0, side), rng.uniform(0, side)
            picture = replace(picture, x=x, y=y, radius=rng.uniform(0.2, 1.0) * side)
        if rng.random() < 0.4:
            picture = with_random_colours(picture, rng)
        pictures.append(picture)
    return draw(pictures, side, side) * 2 - 1


@torch.no_grad()
def measure_scale(autoencoder: Any, rng: random.Random) -> None:
    """Write the shift and scale that give named drawings latents of mean zero and variance one."""
    pictures = [random_picture(rng.choice(COMBINATIONS), USUAL, USUAL, rng, size=None, place=None) for _ in range(256)]
    latents = autoencoder.encode(draw(pictures, USUAL, USUAL) * 2 - 1).latent_dist.sample()
    autoencoder.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )


@torch.no_grad()
def encode(autoencoder: Any, images_B3HW: Tensor) -> Tensor:
    """Scaled latents of images in 0..1, as the transformer knows them."""
    latents = autoencoder.encode(images_B3HW * 2 - 1).latent_dist.mode()
    return (latents.float() - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


@torch.no_grad()
def decode(autoencoder: Any, latents_BCHW: Tensor) -> Tensor:
    """Images in 0..1 of scaled latents."""
    latents = latents_BCHW / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    return (autoencoder.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
