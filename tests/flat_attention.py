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
    slots_T: torch.Tensor
    lengths_T: list[torch.Tensor]
    table_starts_T: torch.Tensor
    tables: torch.Tensor


class FlatAttention:
    """In a fixed number of operations whatever the lengths, as a capturable backend computes: token by token."""

    def __init__(self, spec: KVCacheSpec):
        self._spec = spec

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        shape = (2, num_blocks * BLOCK, self._spec.num_kv_heads, self._spec.head_dim)
        return [torch.zeros(shape, device=self._spec.device) for _ in range(self._spec.num_layers)]

    def plan(self, layout: TokenLayout, staging: Staging) -> Plan:
        slots_T = staging.put(layout.slots(BLOCK), torch.int64)
        new = zip(layout.num_computed, layout.num_new, strict=True)
        lengths_T = staging.put([start + 1 + i for start, num in new for i in range(num)], torch.int32)
        blocks, starts_S = layout.flat_tables()
        starts_T = staging.put(np.repeat(starts_S, layout.num_new), torch.int32)
        return Plan(slots_T, [lengths_T], starts_T, staging.put(blocks, torch.int32))

    def attend(self, q_TNH, new_T2KH, kv, plan, *, scale, window=None, softcap=None):
        kv[0][plan.slots_T], kv[1][plan.slots_T] = new_T2KH.unbind(1)
        device, first = kv.device, plan.tables.storage_offset()
        # All of the buffer behind the tables' start, as a kernel reads it: a graph is not told how long they are.
        num = plan.tables.untyped_storage().nbytes() // 4 - first
        every = plan.tables.as_strided((num,), (1,), first)
        at_TW = plan.table_starts_T[:, None] + torch.arange(MAX_BLOCKS, device=device)
        tables_TW = every[at_TW.clamp(max=num - 1)].clamp(0, kv.shape[1] // BLOCK - 1)
        slots_TL = (tables_TW[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)
        mask_T11L = (torch.arange(slots_TL.shape[1], device=device) < plan.lengths_T[0][:, None])[:, None, None]
        keys, values = (part[slots_TL].transpose(1, 2) for part in kv)
        out = F.scaled_dot_product_attention(
            q_TNH[:, :, None], keys, values, attn_mask=mask_T11L, scale=scale, enable_gqa=True
        )
        return out[:, :, 0]
