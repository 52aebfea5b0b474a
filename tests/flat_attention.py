"""An attention backend fit for graphs, of torch's operations only: where there is no GPU it stands for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from models.attention.base import KVCacheSpec, TokenLayout
from models.staging import Staging

BLOCK, MAX_BLOCKS = 4, 16
"""Positions of a block, and blocks of a sequence at most."""


@dataclass(frozen=True)
class Plan:
    sequence_T: torch.Tensor
    positions_T: torch.Tensor
    behind_S: torch.Tensor
    starts_S: torch.Tensor
    tables: torch.Tensor


class FlatAttention:
    """In a fixed number of operations whatever the lengths, as a capturable backend computes: token by token. Where
    the new positions go is worked out on the device."""

    is_capturable = True

    def __init__(self, spec: KVCacheSpec):
        self._spec = spec

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        shape = (2, num_blocks * BLOCK, self._spec.num_kv_heads, self._spec.head_dim)
        return [torch.zeros(shape, device=self._spec.device) for _ in range(self._spec.num_layers)]

    def copy_blocks(self, kv, sources, targets):
        for layer in kv:
            blocks = layer.unflatten(1, (-1, BLOCK))
            blocks[:, targets] = blocks[:, sources]

    def plan(self, layout: TokenLayout, staging: Staging) -> Plan:
        num_S = len(layout.num_new)
        sequence_T = staging.put(np.repeat(np.arange(num_S), layout.num_new), torch.int64)
        new = zip(layout.num_computed, layout.num_new, strict=True)
        positions_T = staging.put([start + i for start, num in new for i in range(num)], torch.int32)
        known = layout.behind is None
        behind_S = staging.put([0] * num_S, torch.int32) if known else staging.place(layout.behind)
        blocks, starts_S = layout.flat_tables()
        starts_S = staging.put(starts_S, torch.int32)
        return Plan(sequence_T, positions_T, behind_S, starts_S, staging.put(blocks, torch.int32))

    def attend(self, q_TNH, new_T2KH, kv, plan, *, scale, window=None, softcap=None):
        device, first = kv.device, plan.tables.storage_offset()
        # All of the buffer behind the tables' start, as a kernel reads it: a graph is not told how long they are.
        num = plan.tables.untyped_storage().nbytes() // 4 - first
        every = plan.tables.as_strided((num,), (1,), first)
        starts_T = plan.starts_S[plan.sequence_T]
        positions_T = plan.positions_T - plan.behind_S[plan.sequence_T]
        slots_T = every[starts_T + positions_T // BLOCK] * BLOCK + positions_T % BLOCK
        kv[0][slots_T], kv[1][slots_T] = new_T2KH.unbind(1)
        at_TW = starts_T[:, None] + torch.arange(MAX_BLOCKS, device=device)
        tables_TW = every[at_TW.clamp(max=num - 1)].clamp(0, kv.shape[1] // BLOCK - 1)
        slots_TL = (tables_TW[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)
        mask_T11L = (torch.arange(slots_TL.shape[1], device=device) <= positions_T[:, None])[:, None, None]
        keys, values = (part[slots_TL].transpose(1, 2) for part in kv)
        out = F.scaled_dot_product_attention(
            q_TNH[:, :, None], keys, values, attn_mask=mask_T11L, scale=scale, enable_gqa=True
        )
        return out[:, :, 0]


class Captures:
    """Stands in for CUDA: remembers how often it captured, and replays into the tensor of the capture."""

    def __init__(self) -> None:
        self.num = 0
        self.num_replays = 0

    def __call__(self, forward):
        self.num += 1
        hidden = forward().clone()

        def replay() -> None:
            self.num_replays += 1
            hidden.copy_(forward())

        return replay, hidden
