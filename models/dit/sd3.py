"""Text to image with Stable Diffusion 3's transformer (MMDiT; Esser et al., 2024): `StableDiffusion3Pipeline`.

Two CLIP encoders read the prompt and a T5 encoder where there is one; without it rows of zeros stand in its place. The
conditioning is of one length for every prompt and the transformer takes no mask, so rows mix freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.dit.autoencoder import ImageDecoder
from models.dit.base import Conditioning, DiTSpec, count_parameters
from models.dit.part import Recipe

# Legend: R rows of a forward, B images, C latent channels, H and W latent height and width


class StableDiffusion3:
    """A `DiT` over the components of a `StableDiffusion3Pipeline`."""

    def __init__(self, pipeline: Any, spec: DiTSpec, max_sequence_length: int) -> None:
        """`max_sequence_length`: rows of T5 tokens, or of zeros, behind the 77 of CLIP."""
        self.spec = spec
        self._pipeline = pipeline
        self._max_sequence_length = max_sequence_length
        self._transformer = pipeline.transformer
        self._decoder = ImageDecoder(pipeline.vae)
        self.num_parameters: int = count_parameters(pipeline.components.values())

    def check_prompt(self, prompt: str) -> None:
        """Any text will do; what is longer than an encoder reads is cut, as in diffusers."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self._decoder.factor
        return self._transformer.config.in_channels, height // factor, width // factor

    def num_tokens(self, width: int, height: int) -> int:
        _, rows, columns = self.latent_shape(width, height)
        patch: int = self._transformer.config.patch_size
        return (rows // patch) * (columns // patch)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        texts_BTD, _, pooled_BD, _ = self._pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self._transformer.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        # Copies, so that a prompt does not keep the others of its batch in memory.
        return [
            Conditioning({"text": texts_BTD[i : i + 1].clone(), "pooled": pooled_BD[i : i + 1].clone()}, count)
            for i, count in enumerate(self._count_tokens(prompts))
        ]

    def predict(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        return _predict(self._transformer, latents_RCHW, times_R, conditioning)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self._decoder(latents_BCHW)

    def _count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """By the tokenizer that reads farthest."""
        pipeline = self._pipeline
        if pipeline.tokenizer_3 is not None:
            tokenizer, longest = pipeline.tokenizer_3, self._max_sequence_length
        else:
            tokenizer, longest = pipeline.tokenizer, pipeline.tokenizer_max_length
        ids = tokenizer(list(prompts), truncation=True, max_length=longest).input_ids
        return [len(row) for row in ids]


@torch.no_grad()
def _predict(transformer: Any, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    dtype = transformer.dtype
    output_RCHW: Tensor = transformer(
        hidden_states=latents_RCHW.to(dtype),
        timestep=times_R,
        encoder_hidden_states=torch.cat([row.tensors["text"] for row in conditioning]).to(dtype),
        pooled_projections=torch.cat([row.tensors["pooled"] for row in conditioning]).to(dtype),
        return_dict=False,
    )[0]
    return output_RCHW.float()


RECIPE = Recipe(_predict, image="pos_embed", text="context_embedder", output="proj_out")
"""For several ranks."""
