"""The fast path on CPU: a sequence's blocks are gathered into one matrix per head, then torch's kernels compute.

A layer's cache is [blocks, 2, K, block, H]: the gather copies runs of one head's positions (4 KB for Qwen3 0.6B) and
lays them one after the other, so that the kernel finds each head's keys and values as one matrix. With the heads inside
the positions it had to step over the others' rows: 14 against 9 ms for a layer of 32 decodes over 576 positions (two
threads, Intel Xeon with AMX). Fresh memory is asked for as little as can be: with new pages every step the gather costs
six times more (50 against 8 ms for 39 MB, one thread, AMD EPYC).

A prefill chunk is computed sequence by sequence in tiles of queries, each against the keys its last row sees. Decodes
are computed together (`cpu_decodes.py`).

Legend: T tokens of the step, L positions (padded), N query heads, K key/value heads, H head dimension, R runs (one
head's keys or values in one block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import gcd

import numpy as np
import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.attention.cpu_decodes import ALIGN, CpuDecodes, Decodes, Gather, untouched_zeros
from models.attention.decode_groups import runs_of
from models.attention.dense import attend_dense
from models.staging import Staging

_TILE = 256
"""Queries of a prefill tile. Bounds the masked half of the square that is computed in vain."""
_COPIES_SHARE = 1 / 2
"""Memory for copies of what decodes have cached, as a share of the cache; taken when used."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some new tokens of one sequence: rows `start` to `stop` of the step."""

    start: int
    stop: int
    runs_R: torch.Tensor
    masks: list[torch.Tensor]
    """One per tile: [queries, L], 0 where a query sees a key, -inf elsewhere."""


@dataclass(frozen=True, slots=True)
class _Plan:
    layout: TokenLayout
    places_R: torch.Tensor
    """Where the new keys and values go, by token, keys before values, head: in rows of one head and position."""
    fresh: torch.Tensor | None
    """Blocks first written in this step and not filled by it. What an earlier owner left in their tails is masked, but
    0 * NaN is NaN: they are cleared, so that no sequence can poison a later one."""
    work: dict[int | None, tuple[list[Decodes], list[_Chunk]]] = field(default_factory=dict)
    """What to gather and mask, by sliding window; made when the first layer with that window asks."""


class CpuAttention:
    """Paged attention with torch's own kernels, one thread or many."""

    def __init__(self, spec: KVCacheSpec, num_heads: int):
        self._spec = spec
        self._num_heads = num_heads
        self._blocks_multiple = ALIGN // gcd(ALIGN, spec.block_size)
        self._gather = Gather(spec)
        self._decodes = CpuDecodes(spec, num_heads, self._gather, max_bytes=0)

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        max_bytes = int(num_blocks * spec.block_bytes * _COPIES_SHARE)
        self._decodes = CpuDecodes(spec, self._num_heads, self._gather, max_bytes=max_bytes)
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return [untouched_zeros(shape, spec.dtype) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            layer[targets] = layer[sources]

    def plan(self, layout: TokenLayout, staging: Staging) -> _Plan:
        self._decodes.begin_step()
        layout = layout.exact()
        size, num_runs = self._spec.block_size, 2 * self._spec.num_kv_heads
        slots_T1 = np.array(layout.slots(size))[:, None]
        places_TR = slots_T1 // size * (num_runs * size) + slots_T1 % size + np.arange(num_runs) * size
        fresh = []
        for num_new, start, table in zip(layout.num_new, layout.num_computed, layout.block_tables, strict=True):
            last, filled = divmod(start + num_new, size)
            if filled and last * size >= start:
                fresh.append(table[last])
        return _Plan(layout, torch.from_numpy(places_TR.reshape(-1)), torch.tensor(fresh) if fresh else None)

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
        if plan.fresh is not None:
            kv.index_fill_(0, plan.fresh, 0)
        new_TRH = new_T2KH.reshape(len(q_TNH), -1, self._spec.head_dim)
        kv.view(-1, self._spec.head_dim).index_copy_(0, plan.places_R, new_TRH.flatten(0, 1))
        if window not in plan.work:
            plan.work[window] = self._work(plan.layout, window, is_plain=softcap is None)
        decodes, chunks = plan.work[window]
        if len(decodes) == 1 and isinstance(decodes[0].rows_S, slice) and not chunks:
            return self._decodes.attend(q_TNH, new_TRH, kv, decodes[0], scale, softcap)
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        for part in decodes:
            rows = part.rows_S
            out_TNH[rows] = self._decodes.attend(q_TNH[rows], new_TRH[rows], kv, part, scale, softcap)
        for chunk in chunks:
            rows = slice(chunk.start, chunk.stop)
            self._prefill(q_TNH[rows], kv, chunk, scale, softcap, out_TNH[rows])
        return out_TNH

    def _prefill(
        self,
        q_TNH: torch.Tensor,
        kv: torch.Tensor,
        chunk: _Chunk,
        scale: float,
        softcap: float | None,
        out_TNH: torch.Tensor,
    ) -> None:
        """Fill `out_TNH`."""
        keys, values = self._gather(kv, chunk.runs_R, 1)
        start = 0
        for mask_TL in chunk.masks:
            num, length = mask_TL.shape
            out_1NTH = attend_dense(
                q_TNH[start : start + num].transpose(0, 1).unsqueeze(0),
                keys[:, :, :length],
                values[:, :, :length],
                mask_TL,
                scale=scale,
                softcap=softcap,
            )
            out_TNH[start : start + num] = out_1NTH[0].transpose(0, 1)
            start += num

    def _work(self, layout: TokenLayout, window: int | None, *, is_plain: bool) -> tuple[list[Decodes], list[_Chunk]]:
        lengths = [new + computed for new, computed in zip(layout.num_new, layout.num_computed, strict=True)]
        starts = list(chain((0,), np.cumsum(layout.num_new).tolist()))
        alone = [index for index, num_new in enumerate(layout.num_new) if num_new == 1]
        decodes = self._decodes.plan(alone, lengths, starts, layout, window, is_plain=is_plain)
        chunks = [
            self._chunk(starts[index], num_new, lengths[index], layout.block_tables[index], window)
            for index, num_new in enumerate(layout.num_new)
            if num_new > 1
        ]
        return decodes, chunks

    def _chunk(self, start: int, num_new: int, length: int, table: Sequence[int], window: int | None) -> _Chunk:
        size = self._spec.block_size
        first = 0 if window is None else max(0, length - num_new - window + 1) // size
        first -= first % self._blocks_multiple  # a key's place in its vector then depends on its position only
        ids = list(table[first : -(-length // size)])
        ids += [ids[0]] * (-len(ids) % self._blocks_multiple)
        masks = []
        for begin in range(length - num_new, length, _TILE):
            end = min(begin + _TILE, length)
            seen = end - first * size
            positions_1L = np.arange(seen + -seen % ALIGN)[None] + first * size
            masks.append(self._mask(np.arange(begin, end)[:, None], positions_1L, window))
        return _Chunk(start, start + num_new, runs_of(np.array([ids]), self._spec.num_kv_heads), masks)

    def _mask(self, queries: np.ndarray, keys: np.ndarray, window: int | None) -> torch.Tensor:
        """0 where the query position sees the key position, -inf elsewhere."""
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0))).to(self._spec.dtype)
