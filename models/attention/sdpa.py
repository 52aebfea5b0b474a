"""The reference: every sequence on its own, its blocks gathered, an explicit mask, torch's attention. Any device.

Slow and simple on purpose: other backends are tested against it. A sequence's result cannot depend on its mates,
because nothing here ever sees two sequences at once.

Legend: T tokens of the step, L positions of one sequence, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.attention.base import SCALE_BYTES, KVCacheSpec, TokenLayout
from models.attention.dense import attend_dense
from models.attention.quantized_kv import pack, unpack
from models.staging import Staging


@dataclass(frozen=True, slots=True)
class _Rows:
    """One sequence in a step: its tokens are rows `start` to `stop`, its cache the slots `slots_L`."""

    start: int
    stop: int
    slots_L: torch.Tensor
    told_T: torch.Tensor
    """Of its new tokens, as positions in the sequence, where nothing is `behind`."""
    behind: torch.Tensor | None

    @property
    def positions_T(self) -> torch.Tensor:
        return self.told_T if self.behind is None else self.told_T - self.behind


class SdpaAttention:
    """Cache of one layer: keys and values as [2, slots, K, H]; position p of a sequence is in slot
    `block_table[p // block_size] * block_size + p % block_size`. Quantised, a row is H bytes and those of its scale."""

    def __init__(self, spec: KVCacheSpec, num_heads: int):
        self._spec = spec
        self._num_heads = num_heads

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec, width, dtype = self._spec, self._spec.head_dim, self._spec.dtype
        if spec.is_quantized:
            width, dtype = width + SCALE_BYTES, torch.uint8
        shape = (2, num_blocks * spec.block_size, spec.num_kv_heads, width)
        return [torch.zeros(shape, dtype=dtype, device=spec.device) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            blocks = layer.view(2, -1, self._spec.block_size, *layer.shape[2:])
            blocks[:, targets] = blocks[:, sources]

    def plan(self, layout: TokenLayout, staging: Staging) -> list[_Rows]:
        size = self._spec.block_size
        rows = []
        start = 0
        behind_S = None if layout.behind is None else staging.place(layout.behind)
        for index, (num_new, num_computed) in enumerate(zip(layout.num_new, layout.num_computed, strict=True)):
            positions_L = np.arange(num_computed + num_new)
            slots_L = np.array(layout.block_tables[index], np.int64)[positions_L // size] * size + positions_L % size
            told_T = staging.put(positions_L[num_computed:], torch.int64)
            behind = None if behind_S is None else behind_S[index]
            rows.append(_Rows(start, start + num_new, staging.put(slots_L, torch.int64), told_T, behind))
            start += num_new
        return rows

    def attend(
        self,
        q_TNH: torch.Tensor,
        new_T2KH: torch.Tensor,
        kv: torch.Tensor,
        plan: list[_Rows],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        spec = self._spec
        slots_T = torch.cat([row.slots_L[row.positions_T] for row in plan])
        new_2TKH = new_T2KH.transpose(0, 1)
        kv[:, slots_T] = pack(new_2TKH, spec.kv_dtype) if spec.is_quantized else new_2TKH
        return torch.cat([self._one(q_TNH[row.start : row.stop], kv, row, scale, window, softcap) for row in plan])

    def _one(
        self,
        q_TNH: torch.Tensor,
        kv: torch.Tensor,
        row: _Rows,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        spec, positions_T = self._spec, row.positions_T
        cached_L = torch.arange(len(row.slots_L), device=q_TNH.device)
        kv_2LKH = kv[:, row.slots_L]
        if spec.is_quantized:
            kv_2LKH = unpack(kv_2LKH, spec.kv_dtype, spec.dtype)
        if row.behind is not None:  # the last slots are not written yet, and 0 * NaN is NaN
            kv_2LKH = kv_2LKH.masked_fill((cached_L > positions_T[-1])[:, None, None], 0)
        distance_TL = positions_T[:, None] - cached_L[None, :]
        is_hidden_TL = distance_TL < 0
        if window is not None:
            is_hidden_TL |= distance_TL >= window
        k_1KLH, v_1KLH = kv_2LKH.transpose(1, 2).unsqueeze(1)
        out_NTH = attend_dense(
            q_TNH.transpose(0, 1)[None],
            k_1KLH,
            v_1KLH,
            torch.zeros_like(distance_TL, dtype=q_TNH.dtype).masked_fill_(is_hidden_TL, -torch.inf),
            scale=scale,
            softcap=softcap,
        )[0]
        return out_NTH.transpose(0, 1)
