"""Class-conditional diffusion transformers (Peebles and Xie, 2023) of a given shape, without weights: configs to load.

A folder in diffusers' layout; loaded with random weights (`load_format` "dummy"), it computes what a trained model of
that shape computes, at the same speed. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTShape:
    """What decides about speed. Patches are two by two, the mlp is four times as wide as the model."""

    num_layers: int
    width: int
    num_heads: int
    side: int
    """Latent elements each way."""
    vae_channels: tuple[int, ...]
    """Of the VAE's blocks; each but the first halves the image's sides."""

    @property
    def num_tokens(self) -> int:
        """Of one row."""
        return (self.side // 2) ** 2

    @property
    def row_flop(self) -> float:
        """Operations of the matrix products that one row of a forward takes: linear layers, attention, modulation."""
        linear = 2 * 12 * self.width**2 * self.num_tokens
        attention = 4 * self.num_tokens**2 * self.width
        modulation = 2 * 6 * self.width**2
        return float(self.num_layers * (linear + attention + modulation))


_NARROW_VAE = (16, 32, 32, 32)
STANDARD_VAE = (128, 256, 512, 512)
"""Of Stable Diffusion and DiT: 620 GFLOP for 256 x 256 pixels, as much as fifty rows of a DiT-S/2."""

DIT_S_2 = DiTShape(num_layers=12, width=384, num_heads=6, side=32, vae_channels=_NARROW_VAE)
"""With a narrow VAE, so that what is measured on a CPU is the transformer."""
DIT_XL_2 = DiTShape(num_layers=28, width=1152, num_heads=16, side=32, vae_channels=STANDARD_VAE)
DIT_XL_2_512 = DiTShape(num_layers=28, width=1152, num_heads=16, side=64, vae_channels=STANDARD_VAE)


def write_dit(folder: Path, shape: DiTShape, *, num_inference_steps: int = 20) -> Path:
    """Write the configs into `folder`, which is made. Asked for nothing else, an image takes that many steps."""
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "DiTPipeline",
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "DDIMScheduler"],
        },
        "tandem.json": {"num_inference_steps": num_inference_steps},
        "transformer/config.json": _transformer(shape),
        "vae/config.json": _vae(shape),
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "clip_sample": False},
    }
    for name, values in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return folder


def _transformer(shape: DiTShape) -> dict[str, Any]:
    return {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": shape.side,
        "patch_size": 2,
        "num_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "attention_head_dim": shape.width // shape.num_heads,
        "in_channels": 4,
        "out_channels": 8,
        "attention_bias": True,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


def _vae(shape: DiTShape) -> dict[str, Any]:
    num_blocks = len(shape.vae_channels)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": shape.side * 2 ** (num_blocks - 1),
        "block_out_channels": list(shape.vae_channels),
        "down_block_types": ["DownEncoderBlock2D"] * num_blocks,
        "up_block_types": ["UpDecoderBlock2D"] * num_blocks,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": min(32, shape.vae_channels[0]),
    }
