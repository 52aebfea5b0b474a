"""One rank's part of a diffusion transformer: its shard of the weights, for its rows and its tokens of a step.

A family says in a `Recipe` how its transformer is called and where its tokens can be parted; the transformer itself is
the one of diffusers, its forward included, with fewer weights and other attention. It is built on the meta device, so
that a rank holds and reads its own shard and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from models.dit.base import Conditioning
from models.dit.checkpoint import DiTError
from models.dit.grid import Grid
from models.dit.shards import cut_layers, fill_dummy, fill_from_files
from models.dit.ulysses import TokenParts, UlyssesAttention
from models.kernels.available import has_kernels

# Legend: R rows of a forward, C latent channels, H and W latent height and width


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is a family's own about computing it on several ranks."""

    predict: Callable[[Any, Tensor, Tensor, Sequence[Conditioning]], Tensor]
    """`DiT.predict` with the transformer in front."""
    image: str
    """Name of the layer whose output is the image's tokens."""
    text: str | None
    """And the text's, where they are in the attention."""
    output: str
    """The last layer that computes each token on its own."""


class Part:
    """A rank's part; every rank of the grid makes the same calls."""

    def __init__(self, transformer: nn.Module, recipe: Recipe, grid: Grid, bytes_read: int, num_whole: int) -> None:
        self.transformer = transformer
        self.grid = grid
        self.bytes_read = bytes_read
        """Of the files of weights."""
        self.num_parameters_elsewhere = num_whole - sum(parameter.numel() for parameter in transformer.parameters())
        """What the whole transformer has and this rank has not."""
        self._predict = recipe.predict
        if grid.split.tokens > 1:
            _part_tokens(transformer, recipe, grid)

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.transformer.parameters(), *self.transformer.buffers()))

    def predict(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor | None:
        """`DiT.predict` for all rows, of which this rank computes its part. None on all ranks but the driver."""
        own = self.grid.rows(len(conditioning))
        rows = slice(own.start, own.stop)
        output_RCHW = latents_RCHW[rows]
        if own:
            output_RCHW = self._predict(self.transformer, output_RCHW, times_R[rows], conditioning[rows])
        return self.grid.gather_rows(output_RCHW, len(conditioning))


def build_part(
    transformer_class: type[Any],
    folder: Path,
    recipe: Recipe,
    grid: Grid,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str,
) -> Part:
    """The part of the transformer in `folder` that belongs to a place in the grid. Raises DiTError."""
    with torch.device("meta"):
        transformer = transformer_class.from_config(transformer_class.load_config(folder, local_files_only=True))
    num_whole = sum(parameter.numel() for parameter in transformer.parameters())
    cuts = cut_layers(transformer, grid.shards)
    transformer.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    _restore_positions(folder, transformer)
    bytes_read = 0
    with torch.no_grad():
        if load_format == "dummy":
            fill_dummy(transformer, cuts)
        else:
            bytes_read = fill_from_files(transformer, cuts, folder)
    if has_kernels(device):
        from models.dit.fused_blocks import fuse_blocks

        fuse_blocks(transformer)
    return Part(transformer, recipe, grid, bytes_read, num_whole)


def _restore_positions(folder: Path, transformer: nn.Module) -> None:
    """Values that a network computes when it is built, which on the meta device it could not."""
    for name, buffer in list(transformer.named_buffers()):
        embed: Any = transformer.get_submodule(name.rpartition(".")[0])
        if not (isinstance(embed, PatchEmbed) and name.endswith(".pos_embed")):
            raise DiTError(f"{folder} has the buffer {name}, which ranks cannot restore; serve the model on one device")
        fresh: Any = PatchEmbed(
            height=embed.height * embed.patch_size,
            width=embed.width * embed.patch_size,
            patch_size=embed.patch_size,
            in_channels=embed.proj.in_channels,
            embed_dim=embed.proj.out_channels,
            interpolation_scale=embed.interpolation_scale,
            pos_embed_max_size=embed.pos_embed_max_size,
        )
        buffer.copy_(fresh.pos_embed)


def _part_tokens(transformer: nn.Module, recipe: Recipe, grid: Grid) -> None:
    """Have the transformer compute this rank's tokens, and attend to all."""
    parts = TokenParts(grid)
    transformer.get_submodule(recipe.image).register_forward_hook(parts.take_image)
    if recipe.text is not None:
        transformer.get_submodule(recipe.text).register_forward_hook(parts.take_text)
    transformer.get_submodule(recipe.output).register_forward_hook(parts.gather_image)
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(UlyssesAttention(parts))  # type: ignore[arg-type]  # any callable will do
