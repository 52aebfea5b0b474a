"""Attention over tokens that lie on several ranks (DeepSpeed-Ulysses, Jacobs et al., 2023).

Everything outside attention is the same for every token, so a rank computes it for its own ones: hooks take them where
the transformer has embedded all, and give all back before they become a picture. Inside attention every rank has all
tokens for some of the heads:

    (R, own tokens, all heads)  →  (R, all tokens, own heads)  →  attention  →  (R, own tokens, all heads)

Text tokens of joint attention are shared out as those of the image are. Attention does not ask for an order, so the
tokens of a part stay together, image before text, and nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dit.grid import Grid

# Legend: R rows, S own tokens, T all tokens, N heads of this rank's layers, M those it attends with, H head dimension


class TokenParts:
    """Forward hooks that take a rank's tokens and gather them, and the number there is in the forward under way."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.num_image = 0
        self.num_text = 0

    def take_image(self, module: nn.Module, inputs: Any, x_RTD: Tensor) -> Tensor:
        self.num_image = x_RTD.shape[1]
        return self._take(x_RTD)

    def take_text(self, module: nn.Module, inputs: Any, x_RTD: Tensor) -> Tensor:
        self.num_text = x_RTD.shape[1]
        return self._take(x_RTD)

    def gather_image(self, module: nn.Module, inputs: Any, x_RSD: Tensor) -> Tensor:
        return self.grid.gather_tokens(x_RSD, self.num_image)

    def counts(self, has_text: bool) -> list[int]:
        """Tokens in an attention on each rank."""
        images, texts = (self.grid.token_counts(number) for number in (self.num_image, self.num_text))
        return [image + text for image, text in zip(images, texts)] if has_text else images

    def _take(self, x_RTD: Tensor) -> Tensor:
        own = self.grid.tokens(x_RTD.shape[1])
        return x_RTD[:, own.start : own.stop].contiguous()


class UlyssesAttention:
    """A processor for `Attention` of diffusers: of an image with itself, or jointly with its text."""

    def __init__(self, parts: TokenParts) -> None:
        self._parts = parts

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        image_RSD, text_RSD = hidden_states, encoder_hidden_states
        query, key, value = (
            _heads(attn, image_RSD, project, norm)
            for project, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))
        )
        if text_RSD is not None:
            added = (
                (attn.add_q_proj, attn.norm_added_q),
                (attn.add_k_proj, attn.norm_added_k),
                (attn.add_v_proj, None),
            )
            texts = [_heads(attn, text_RSD, project, norm) for project, norm in added]
            query, key, value = (torch.cat(pair, 1) for pair in zip((query, key, value), texts))
        mixed_RSD = self._attend(torch.cat((query, key, value), -1), text_RSD is not None).flatten(2)
        num_image = image_RSD.shape[1]
        # The second of to_out is the dropout of training.
        image_RSD = attn.to_out[0](mixed_RSD[:, :num_image])
        if text_RSD is None:
            return image_RSD
        text_RSD = mixed_RSD[:, num_image:]
        return image_RSD, text_RSD if attn.context_pre_only else attn.to_add_out(text_RSD)

    def _attend(self, qkv_RSNE: Tensor, has_text: bool) -> Tensor:
        """E: query, key and value of a head side by side, which travel together."""
        counts = self._parts.counts(has_text)
        qkv_RMTE = self._parts.grid.to_heads(qkv_RSNE, counts).transpose(1, 2)
        query, key, value = qkv_RMTE.chunk(3, -1)
        mixed_RMTH = F.scaled_dot_product_attention(query, key, value)
        return self._parts.grid.to_tokens(mixed_RMTH.transpose(1, 2), counts)


def _heads(attn: Any, x_RSD: Tensor, project: nn.Module, norm: nn.Module | None) -> Tensor:
    x_RSNH: Tensor = project(x_RSD).unflatten(-1, (attn.heads, -1))
    return x_RSNH if norm is None else norm(x_RSNH)
