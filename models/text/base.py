"""What the runner asks of a language model: one forward over the flat tokens of a step, and logits where wanted.

Legend: T new tokens of the step, D hidden size, V vocabulary, R rows that want logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from models.attention.base import AttentionBackend


class ModelError(ValueError):
    """The checkpoint is not one this package can compute; the message says what it is and what would work."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The geometry of a decoder, read from a checkpoint's `config.json`. Sizes the KV cache."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class StepContext:
    """What every layer of one forward shares: the attention backend, its plan and the cache, by layer."""

    attention: AttentionBackend
    plan: Any
    kv_cache: list[Any]


class CausalLM(Protocol):
    """A decoder over flat tokens. Both the native decoder and `hf.py` satisfy it; one engine step is one `forward`."""

    spec: DecoderSpec
    """Of the whole model."""
    rank_spec: DecoderSpec
    """With the layers and heads that this rank computes; sizes its KV cache."""

    @property
    def num_parameters(self) -> int: ...

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        """hidden_TD after the final norm. `token_ids_T` and `positions_T` are int64 on the model's device."""
        ...

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """logits_RV in float32."""
        ...
