"""Drives a `CausalLM` on KV blocks by hand, as the runner does: new tokens for some sequences, one forward a step.

Blocks are dealt out scattered over the cache, so that a backend that takes neighbours for granted fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.attention.build import make_attention
from models.staging import Staging
from models.text.base import CausalLM, DecoderSpec, StepContext


def cache_spec(spec: DecoderSpec, *, block_size: int = 8, dtype: torch.dtype | None = None) -> KVCacheSpec:
    return KVCacheSpec(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=block_size,
        dtype=dtype or spec.dtype,
        device=torch.device("cpu"),
    )


class PagedModel:
    """A model with its cache and the state of its sequences, by name."""

    def __init__(self, model: CausalLM, attention: str | AttentionBackend = "sdpa", *, num_blocks: int = 64):
        self.model = model
        self.spec = cache_spec(model.rank_spec)
        self.attention = (
            make_attention(attention, self.spec, model.rank_spec.num_heads) if isinstance(attention, str) else attention
        )
        self.staging = Staging(self.spec.device)
        self.cache: list[Any] = self.attention.allocate(num_blocks)
        generator = torch.Generator().manual_seed(1)
        self.free: list[int] = torch.randperm(num_blocks, generator=generator).tolist()
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.num_forwards = 0

    def step(self, new: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """logits [tokens, V] of every sequence's new tokens, from one forward."""
        parts = self.model.logits(self.forward(new)).split([len(tokens) for tokens in new.values()])
        return dict(zip(new, parts, strict=True))

    def forward(self, new: Mapping[str, Sequence[int]]) -> torch.Tensor:
        """hidden [tokens, D] of the new tokens, flat."""
        for name, tokens in new.items():
            table = self.tables.setdefault(name, [])
            length = self.lengths.setdefault(name, 0) + len(tokens)
            while len(table) * self.spec.block_size < length:
                table.append(self.free.pop())
        layout = TokenLayout(
            num_new=[len(tokens) for tokens in new.values()],
            num_computed=[self.lengths[name] for name in new],
            block_tables=[self.tables[name] for name in new],
        )
        positions = [self.lengths[name] + index for name, tokens in new.items() for index in range(len(tokens))]
        context = StepContext(self.attention, self.attention.plan(layout, self.staging), self.cache)
        token_ids_T = torch.tensor([token for tokens in new.values() for token in tokens])
        hidden_TD = self.model.forward(token_ids_T, torch.tensor(positions), context)
        self.num_forwards += 1
        for name, tokens in new.items():
            self.lengths[name] += len(tokens)
        return hidden_TD

    def fork(self, name: str, new_name: str, num_blocks: int) -> None:
        """`new_name` begins with the first `num_blocks` blocks of `name`, shared (a prefix hit)."""
        self.tables[new_name] = self.tables[name][:num_blocks]
        self.lengths[new_name] = num_blocks * self.spec.block_size
