"""The reference: every sequence on its own, its blocks gathered, an explicit mask, torch's attention. Any device.

Slow and simple on purpose: other backends are tested against it. A sequence's result cannot depend on its mates,
because nothing here ever sees two sequences at once.

Legend: T tokens of the step, L positions of one sequence, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.attention.dense import attend_dense


@dataclass(frozen=True, slots=True)
class _Rows:
    """One sequence in a step: its tokens are rows `start` to `stop`, its cache the slots `slots_L`."""

    start: int
    stop: int
    slots_L: torch.Tensor
    positions_T: torch.Tensor
    """Of its new tokens, as positions in the sequence."""


@dataclass(frozen=True, slots=True)
class _Plan:
    rows: list[_Rows]
    slots_T: torch.Tensor


class SdpaAttention:
    """Cache of one layer: keys and values as [2, slots, K, H]; position p of a sequence is in slot
    `block_table[p // block_size] * block_size + p % block_size`."""

    def __init__(self, spec: KVCacheSpec, num_heads: int):
        self._spec = spec
        self._num_heads = num_heads

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        shape = (2, num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)
        return [torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            blocks = layer.view(2, -1, self._spec.block_size, *layer.shape[2:])
            blocks[:, targets] = blocks[:, sources]

    def plan(self, layout: TokenLayout) -> _Plan:
        size, device = self._spec.block_size, self._spec.device
        rows = []
        start = 0
        for num_new, num_computed, table in zip(layout.num_new, layout.num_computed, layout.block_tables, strict=True):
            positions_L = torch.arange(num_computed + num_new)
            slots_L = torch.tensor(table)[positions_L // size] * size + positions_L % size
            rows.append(_Rows(start, start + num_new, slots_L.to(device), positions_L[num_computed:].to(device)))
            start += num_new
        slots_T = torch.cat([row.slots_L[len(row.slots_L) - (row.stop - row.start) :] for row in rows])
        return _Plan(rows, slots_T)

    def attend(
        self,
        q_TNH: torch.Tensor,
        new_T2KH: torch.Tensor,
        kv: torch.Tensor,
        plan: _Plan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        keys, values = kv
        keys[plan.slots_T], values[plan.slots_T] = new_T2KH.unbind(1)
        return torch.cat(
            [self._one(q_TNH[row.start : row.stop], keys, values, row, scale, window, softcap) for row in plan.rows]
        )

    def _one(
        self,
        q_TNH: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        row: _Rows,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        cached_L = torch.arange(len(row.slots_L), device=q_TNH.device)
        distance_TL = row.positions_T[:, None] - cached_L[None, :]
        is_hidden_TL = distance_TL < 0
        if window is not None:
            is_hidden_TL |= distance_TL >= window
        out_NTH = attend_dense(
            q_TNH.transpose(0, 1)[None],
            keys[row.slots_L].transpose(0, 1)[None],
            values[row.slots_L].transpose(0, 1)[None],
            torch.zeros_like(distance_TL, dtype=q_TNH.dtype).masked_fill_(is_hidden_TL, -torch.inf),
            scale=scale,
            softcap=softcap,
        )[0]
        return out_NTH.transpose(0, 1)
