"""What of a diffusion transformer's config decides how it can be split, and what each rank of a split holds.

Three shapes of blocks: DiT (Peebles and Xie, 2023; one stream of image tokens), Stable Diffusion 3 (Esser et al., 2024;
image and text tokens with weights of their own that attend together) and FLUX (blocks of both kinds, then blocks where
the two are one stream and attention and feed-forward are added at once). Attention and feed-forward are split by tensor
parallelism; embeddings, modulation and norms are on every rank. Text encoders and the VAE are on the driver only.

Legend: D width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.ranks.text_geometry import GeometryError, number_bytes

_TIMESTEP_WIDTH = 256
"""Of the sinusoidal embedding of a time, in diffusers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageGeometry:
    """The shape of a diffusion transformer."""

    architecture: str
    num_heads: int
    head_dim: int
    num_attentions: int
    """In one forward."""
    split_parameters: int
    """Matrices and column biases that tensor parallelism cuts into equal shards."""
    whole_parameters: int
    """On every rank."""
    num_sums: int
    """All-reduces of a forward under tensor parallelism."""
    image_sums: int
    text_sums: int
    """Those that the image's tokens take part in, and the text's."""
    token_side: int
    """Pixels of a token's side."""
    token_latents: int
    """Numbers of the latents in a token."""
    default_side: int
    """Pixels."""
    text_tokens: int
    """That attend with the image's; 0 where the condition is a class."""
    text_width: int
    """Of the text encoder's output, as it comes to the transformer."""
    num_guided_rows: int
    """Rows of one guided image: 2, or 1 where guidance is an input of the model."""
    bytes_per_weight: int

    kind = "image"

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        return self.split_parameters + self.whole_parameters

    def weight_bytes(self, tensor_size: int = 1) -> int:
        """Of the transformer on each rank."""
        return (-(-self.split_parameters // tensor_size) + self.whole_parameters) * self.bytes_per_weight

    def image_tokens(self, width: int, height: int) -> int:
        return (width // self.token_side) * (height // self.token_side)


def read_image(
    config: dict[str, Any], *, dtype: str = "auto", on_cuda: bool = False, latent_factor: int = 8
) -> ImageGeometry:
    """The geometry in a transformer's `config.json`. `dtype` auto is float32, on CUDA of 16 bits.

    `latent_factor`: pixels per latent element, each way.

    Raises GeometryError for a transformer that is none of the three shapes.
    """
    name = str(config.get("_class_name"))
    read = _FAMILIES.get(name)
    if read is None:
        raise GeometryError(f"{name!r} is not among the transformers whose split is known ({', '.join(_FAMILIES)})")
    try:
        return read(config, number_bytes(None, dtype=dtype, on_cuda=on_cuda), latent_factor)
    except (KeyError, TypeError) as error:
        raise GeometryError(f"the config of {name} lacks a number or has a wrong one ({error!r})") from None


def _dit(config: dict[str, Any], bytes_per_weight: int, factor: int) -> ImageGeometry:
    layers, heads, head_dim = config["num_layers"], config["num_attention_heads"], config["attention_head_dim"]
    width, patch = heads * head_dim, config.get("patch_size", 2)
    out_channels = config.get("out_channels") or config["in_channels"]
    split, row_biases = _block(width, has_bias=config.get("attention_bias", True))
    # Every block embeds time and class by itself.
    embeds = _time_mlp(width) + (config["num_embeds_ada_norm"] + 1) * width
    whole = layers * (row_biases + embeds + _linear(width, 6 * width))
    whole += _linear(config["in_channels"] * patch**2, width) + _linear(width, 2 * width)
    whole += _linear(width, patch**2 * out_channels)
    return ImageGeometry(
        architecture=config["_class_name"],
        num_heads=heads,
        head_dim=head_dim,
        num_attentions=layers,
        split_parameters=layers * split,
        whole_parameters=whole,
        num_sums=2 * layers,
        image_sums=2 * layers,
        text_sums=0,
        token_side=factor * patch,
        token_latents=config["in_channels"] * patch**2,
        default_side=factor * config["sample_size"],
        text_tokens=0,
        text_width=0,
        num_guided_rows=2,
        bytes_per_weight=bytes_per_weight,
    )


def _sd3(config: dict[str, Any], bytes_per_weight: int, factor: int) -> ImageGeometry:
    layers, heads, head_dim = config["num_layers"], config["num_attention_heads"], config["attention_head_dim"]
    width, patch, has_norm = heads * head_dim, config.get("patch_size", 2), config.get("qk_norm") is not None
    duals = len(config.get("dual_attention_layers") or ())
    block, row_biases = _block(width)
    attention, out_bias = _attention(width)
    # The last block gives no text on: it has no output for it and no feed-forward behind.
    split = layers * block + (layers - 1) * block + 3 * _linear(width, width) + duals * attention
    whole = (2 * layers - 1) * row_biases + duals * out_bias
    whole += layers * _linear(width, 6 * width) + duals * _linear(width, 3 * width)
    whole += (layers - 1) * _linear(width, 6 * width) + _linear(width, 2 * width)
    whole += has_norm * head_dim * (4 * layers + 2 * duals)
    whole += _time_mlp(width) + _linear(config["pooled_projection_dim"], width) + _linear(width, width)
    whole += _linear(config["joint_attention_dim"], config["caption_projection_dim"])
    whole += _linear(config["in_channels"] * patch**2, width) + _linear(width, 2 * width)
    whole += _linear(width, patch**2 * (config.get("out_channels") or config["in_channels"]))
    return ImageGeometry(
        architecture=config["_class_name"],
        num_heads=heads,
        head_dim=head_dim,
        num_attentions=layers + duals,
        split_parameters=split,
        whole_parameters=whole,
        num_sums=2 * layers + duals + 2 * (layers - 1),
        image_sums=2 * layers + duals,
        text_sums=2 * (layers - 1),
        token_side=factor * patch,
        token_latents=config["in_channels"] * patch**2,
        default_side=factor * config["sample_size"],
        text_tokens=77 + 256,
        text_width=config["joint_attention_dim"],
        num_guided_rows=2,
        bytes_per_weight=bytes_per_weight,
    )


def _flux(config: dict[str, Any], bytes_per_weight: int, factor: int) -> ImageGeometry:
    doubles, singles = config["num_layers"], config["num_single_layers"]
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    width, channels = heads * head_dim, config["in_channels"]
    block, row_biases = _block(width)
    split = doubles * 2 * block + singles * (3 * _linear(width, width) + _linear(width, 4 * width) + 5 * width * width)
    whole = doubles * (2 * row_biases + 2 * _linear(width, 6 * width) + 4 * head_dim)
    whole += singles * (width + _linear(width, 3 * width) + 2 * head_dim)
    whole += (1 + bool(config.get("guidance_embeds"))) * _time_mlp(width)
    whole += _linear(config["pooled_projection_dim"], width) + _linear(width, width)
    whole += _linear(config["joint_attention_dim"], width) + _linear(channels, width) + _linear(width, 2 * width)
    whole += _linear(width, config.get("out_channels") or channels)
    return ImageGeometry(
        architecture=config["_class_name"],
        num_heads=heads,
        head_dim=head_dim,
        num_attentions=doubles + singles,
        split_parameters=split,
        whole_parameters=whole,
        num_sums=4 * doubles + singles,
        image_sums=2 * doubles + singles,
        text_sums=2 * doubles + singles,
        token_side=2 * factor,  # four latent elements lie in the channels of a token
        token_latents=channels,
        default_side=128 * factor,
        text_tokens=512,
        text_width=config["joint_attention_dim"],
        num_guided_rows=1,
        bytes_per_weight=bytes_per_weight,
    )


_FAMILIES: dict[str, Callable[[dict[str, Any], int, int], ImageGeometry]] = {
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _attention(width: int, *, has_bias: bool = True) -> tuple[int, int]:
    """Parameters of queries, keys, values and the output: split, and the output's bias, which is added once."""
    return 4 * width * width + 3 * width * has_bias, width


def _block(width: int, *, has_bias: bool = True) -> tuple[int, int]:
    """Attention and a feed-forward of four times the width: split, and the two row biases."""
    attention, out_bias = _attention(width, has_bias=has_bias)
    return attention + _linear(width, 4 * width) + 4 * width * width, out_bias + width


def _time_mlp(width: int) -> int:
    return _linear(_TIMESTEP_WIDTH, width) + _linear(width, width)
