"""The fast path on CPU: gather the blocks a group of sequences needs into one reused buffer, then torch's flash kernel.

A layer's cache is [blocks, 2, K, block, H]: the gather copies runs of one head's positions (4 KB for Qwen3 0.6B) and
lays them one after the other, so that the kernel finds each head's keys and values as one matrix. With the heads inside
the positions it had to step over the others' rows: 14 against 9 ms for a layer of 32 decodes over 576 positions (two
threads, Intel Xeon with AMX). Decodes are batched: sequences of similar length share one gather and one kernel call;
the G query heads of a key head are rows of one product. A prefill chunk is computed sequence by sequence in tiles of
queries, each against the keys its last row sees. Fresh memory is never asked for: with new pages every step the gather
costs six times more (50 against 8 ms for 39 MB, one thread, AMD EPYC).

Decodes that begin with the same blocks (a common prompt) attend those once, all their queries in one product, and each
its own rest; the two parts are joined by their log-sum-exp (as cascade attention, Ye et al., FlashInfer 2024). With 32
sequences of 544 positions, 512 of them common, the common part is read once instead of 32 times.
The joined result is rounded differently in its last bit: in float32 1e-7, in bfloat16 as much as another chunking.

Key lengths are padded to a multiple of 16 and masked. With that a decode's bits do not depend on how far its mates pad
it in bfloat16, and in float32 almost never (MKL picks its kernels by size and alignment; then they differ by 1e-7).

Legend: T tokens of the step, S decoding sequences, L positions (padded), N query heads, K key/value heads, G = N / K,
H head dimension, R runs (one head's keys or values in one block).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import gcd, prod

import numpy as np
import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.attention.dense import attend_dense

_GROUP_BYTES = 4 << 20
"""Keys and values gathered at once for decodes, per thread. More calls cost more than a copy that leaves the
second-level cache (2 MB a core): of 0.6 to 19 MB, 4.7 MB was best or within 5 % for four geometries; the ends cost a
third more."""
_TILE = 256
"""Queries of a prefill tile. Bounds the masked half of the square that is computed in vain."""
_ALIGN = 16
"""Key lengths are padded to this many positions, a full vector of float32 (see above)."""

_LEAST_COMMON = 128
"""Positions that decodes must have in common to be attended once: below, two kernel calls cost more than they save."""
_LEAST_MEMBERS = 4
"""Sequences that must share them."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one new token each, computed in one kernel call."""

    rows_S: torch.Tensor | slice
    """Their rows among the tokens of the step."""
    num_sequences: int
    runs_R: torch.Tensor
    """Keys of all sequences, then values; the same number of blocks for each."""
    mask_S11L: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Family:
    """Decodes that begin with the same blocks."""

    rows_S: torch.Tensor
    common_R: torch.Tensor
    """Of the blocks all begin with."""
    rests: list[_Decodes]
    """What each has beyond them; rows count within the family."""


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
    keys_TK: torch.Tensor
    values_TK: torch.Tensor
    """Where the new ones go, counted in rows of one head and position."""
    fresh: torch.Tensor | None
    """Blocks first written in this step and not filled by it. What an earlier owner left in their tails is masked, but
    0 * NaN is NaN: they are cleared, so that no sequence can poison a later one."""
    work: dict[int | None, tuple[list[_Family], list[_Decodes], list[_Chunk]]] = field(default_factory=dict)
    """What to gather and mask, by sliding window; made when the first layer with that window asks."""


class CpuAttention:
    """Paged attention with torch's own kernels, one thread or many."""

    def __init__(self, spec: KVCacheSpec, num_heads: int):
        self._spec = spec
        self._num_heads = num_heads
        self._num_groups = num_heads // spec.num_kv_heads
        self._run_values = spec.block_size * spec.head_dim
        self._block_bytes = 2 * spec.num_kv_heads * self._run_values * spec.dtype.itemsize
        self._blocks_multiple = _ALIGN // gcd(_ALIGN, spec.block_size)
        self._scratch = torch.empty(0, self._run_values, dtype=spec.dtype)
        # The flash kernel calls a matrix product for every sequence and head; with a few query rows the calls cost more
        # than the work (10.5 against 6.6 ms for 32 sequences of 576 positions, 8 heads of 128, 2 rows a head). For one
        # row, and in float32, it has quicker ways of its own.
        self._multiplies = self._num_groups > 1 and spec.dtype != torch.float32

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return [_untouched_zeros(shape, spec.dtype) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            layer[targets] = layer[sources]

    def plan(self, layout: TokenLayout) -> _Plan:
        size, num_heads = self._spec.block_size, self._spec.num_kv_heads
        slots_T1 = torch.tensor(layout.slots(size))[:, None]
        first_TK = (slots_T1 // size * 2 * num_heads + torch.arange(num_heads)) * size
        keys_TK = first_TK + slots_T1 % size
        fresh = []
        for num_new, start, table in zip(layout.num_new, layout.num_computed, layout.block_tables, strict=True):
            last, filled = divmod(start + num_new, size)
            if filled and last * size >= start:
                fresh.append(table[last])
        return _Plan(layout, keys_TK, keys_TK + num_heads * size, torch.tensor(fresh) if fresh else None)

    def attend(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        kv: torch.Tensor,
        plan: _Plan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        if plan.fresh is not None:
            kv.index_fill_(0, plan.fresh, 0)
        head_dim = self._spec.head_dim
        by_row = kv.view(-1, head_dim)
        by_row.index_copy_(0, plan.keys_TK.view(-1), k_TKH.reshape(-1, head_dim))
        by_row.index_copy_(0, plan.values_TK.view(-1), v_TKH.reshape(-1, head_dim))
        if window not in plan.work:
            plan.work[window] = self._work(plan.layout, window, may_share=softcap is None)
        families, decodes, chunks = plan.work[window]
        runs = kv.view(-1, self._run_values)
        if len(decodes) == 1 and not chunks and not families:
            return self._decode(q_TNH, runs, decodes[0], scale, softcap)
        out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        for family in families:
            out_TNH[family.rows_S] = self._decode_family(q_TNH[family.rows_S], runs, family, scale)
        for group in decodes:
            out_TNH[group.rows_S] = self._decode(q_TNH[group.rows_S], runs, group, scale, softcap)
        for chunk in chunks:
            rows = slice(chunk.start, chunk.stop)
            self._prefill(q_TNH[rows], runs, chunk, scale, softcap, out_TNH[rows])
        return out_TNH

    def _decode(
        self, q_SNH: torch.Tensor, runs: torch.Tensor, group: _Decodes, scale: float, softcap: float | None
    ) -> torch.Tensor:
        q_SKGH, keys, values = self._operands(q_SNH, runs, group)
        if softcap is not None:
            out_SKGH = attend_dense(q_SKGH, keys, values, group.mask_S11L, scale=scale, softcap=softcap)
        elif self._multiplies:
            out_SKGH = _weighted(values, _scores(q_SKGH, keys, group.mask_S11L, scale))
        else:
            out_SKGH = _flash(q_SKGH, keys, values, 0.0, False, attn_mask=group.mask_S11L, scale=scale)[0]
        return out_SKGH.reshape(q_SNH.shape).to(self._spec.dtype)

    def _decode_family(self, q_SNH: torch.Tensor, runs: torch.Tensor, family: _Family, scale: float) -> torch.Tensor:
        """The common positions once for all, each one's rest, and the two joined in float32."""
        spec, num, groups = self._spec, len(family.rows_S), self._num_groups
        q_SKGH = q_SNH.view(num, spec.num_kv_heads, groups, spec.head_dim)
        keys, values = self._gather(runs, family.common_R, 1)
        q_1KRH = q_SKGH.transpose(0, 1).reshape(1, spec.num_kv_heads, num * groups, spec.head_dim)
        out_1KRH, lse_1KR = _flash(q_1KRH, keys, values, 0.0, False, scale=scale)
        common_SKGH = out_1KRH.view(spec.num_kv_heads, num, groups, spec.head_dim).transpose(0, 1).float()
        lse_SKG = lse_1KR.view(spec.num_kv_heads, num, groups).transpose(0, 1)
        joined_SKGH = torch.empty_like(common_SKGH)
        for rest in family.rests:
            rows = rest.rows_S
            q_RKGH, keys, values = self._operands(q_SNH[rows], runs, rest)
            if self._multiplies:
                scores_RKGL = _scores(q_RKGH, keys, rest.mask_S11L, scale)
                out_RKGH, lse_RKG = _weighted(values, scores_RKGL), scores_RKGL.float().logsumexp(-1)
            else:
                out_RKGH, lse_RKG = _flash(q_RKGH, keys, values, 0.0, False, attn_mask=rest.mask_S11L, scale=scale)
            share_RKG1 = torch.sigmoid(lse_RKG - lse_SKG[rows]).unsqueeze(-1)
            joined_SKGH[rows] = torch.lerp(common_SKGH[rows], out_RKGH.float(), share_RKG1)
        return joined_SKGH.reshape(q_SNH.shape).to(spec.dtype)

    def _operands(
        self, q_SNH: torch.Tensor, runs: torch.Tensor, group: _Decodes
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [S, K, G, H] and a group's gathered keys and values [S, K, L, H]."""
        spec, num = self._spec, group.num_sequences
        keys, values = self._gather(runs, group.runs_R, num)
        return q_SNH.reshape(num, spec.num_kv_heads, self._num_groups, spec.head_dim), keys, values

    def _prefill(
        self,
        q_TNH: torch.Tensor,
        runs: torch.Tensor,
        chunk: _Chunk,
        scale: float,
        softcap: float | None,
        out_TNH: torch.Tensor,
    ) -> None:
        """Fill `out_TNH`."""
        keys, values = self._gather(runs, chunk.runs_R, 1)
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

    def _gather(self, runs: torch.Tensor, runs_R: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num, K, L, H], in the buffer that every call reuses."""
        if self._scratch.shape[0] < len(runs_R):
            self._scratch = torch.empty(len(runs_R), self._run_values, dtype=self._spec.dtype)
        gathered = torch.index_select(runs, 0, runs_R, out=self._scratch[: len(runs_R)])
        keys, values = gathered.view(2, num, self._spec.num_kv_heads, -1, self._spec.head_dim)
        return keys, values

    def _runs(self, block_ids: np.ndarray) -> torch.Tensor:
        """Runs of these blocks [sequences, blocks] in the order of a gather: keys and values, sequence, head, block."""
        of_block = np.arange(2 * self._spec.num_kv_heads).reshape(2, 1, -1, 1)
        return torch.from_numpy((block_ids[None, :, None] * of_block.size + of_block).reshape(-1))

    def _work(
        self, layout: TokenLayout, window: int | None, *, may_share: bool
    ) -> tuple[list[_Family], list[_Decodes], list[_Chunk]]:
        lengths = [new + computed for new, computed in zip(layout.num_new, layout.num_computed, strict=True)]
        starts = list(chain((0,), np.cumsum(layout.num_new).tolist()))
        decoding = [index for index, num_new in enumerate(layout.num_new) if num_new == 1]
        families = []
        for members, num_common in self._families(decoding, lengths, layout) if may_share and window is None else ():
            decoding = [index for index in decoding if index not in members]
            places = {index: place for place, index in enumerate(members)}
            rests = [
                self._group(part, lengths, places, layout, window, num_common)
                for part in self._split(members, lengths, window, num_common)
            ]
            common_R = self._runs(np.array([layout.block_tables[members[0]][:num_common]]))
            families.append(_Family(torch.tensor([starts[index] for index in members]), common_R, rests))
        decodes = [
            self._group(members, lengths, starts, layout, window) for members in self._split(decoding, lengths, window)
        ]
        chunks = [
            self._chunk(starts[index], num_new, lengths[index], layout.block_tables[index], window)
            for index, num_new in enumerate(layout.num_new)
            if num_new > 1
        ]
        return families, decodes, chunks

    def _families(
        self, decoding: list[int], lengths: list[int], layout: TokenLayout
    ) -> Iterator[tuple[list[int], int]]:
        """Sequences that begin with the same blocks, and how many of those they have in common (full ones only)."""
        by_first: dict[int, list[int]] = {}
        for index in decoding:
            if lengths[index] > _LEAST_COMMON:
                by_first.setdefault(layout.block_tables[index][0], []).append(index)
        for members in by_first.values():
            if len(members) < _LEAST_MEMBERS:
                continue
            most = min((lengths[index] - 1) // self._spec.block_size for index in members)
            tables = np.array([layout.block_tables[index][:most] for index in members])
            differs = (tables != tables[0]).any(axis=0)
            num_common = int(differs.argmax()) if differs.any() else most
            num_common -= num_common % self._blocks_multiple
            if num_common * self._spec.block_size >= _LEAST_COMMON:
                yield members, num_common

    def _split(
        self, decoding: list[int], lengths: list[int], window: int | None, num_common: int = 0
    ) -> list[list[int]]:
        """Groups of `decoding` sequences whose padded caches (without the first `num_common` blocks) fit the budget, by
        length when one does not do."""
        if not decoding:
            return []
        limit = max(1, _GROUP_BYTES * torch.get_num_threads() // self._block_bytes)
        sizes = {index: self._span(lengths[index], 1, window, num_common)[1] for index in decoding}
        if len(decoding) * max(sizes.values()) <= limit:
            return [decoding]
        groups: list[list[int]] = [[]]
        for index in sorted(decoding, key=lambda index: lengths[index]):
            if groups[-1] and (len(groups[-1]) + 1) * sizes[index] > limit:
                groups.append([])
            groups[-1].append(index)
        return groups

    def _span(self, length: int, num_new: int, window: int | None, num_common: int = 0) -> tuple[int, int]:
        """First block beyond `num_common` that the last `num_new` positions see, and how many from there (padded)."""
        size, multiple = self._spec.block_size, self._blocks_multiple
        first = num_common if window is None else max(0, length - num_new - window + 1) // size
        # Windows begin at a multiple too: a key's place in its vector then depends on its position only.
        first -= first % multiple
        num = -(-length // size) - first
        return first, num + -num % multiple

    def _group(
        self,
        members: list[int],
        lengths: list[int],
        starts: Sequence[int] | dict[int, int],
        layout: TokenLayout,
        window: int | None,
        num_common: int = 0,
    ) -> _Decodes:
        """`starts`: the row of each sequence's token."""
        size = self._spec.block_size
        spans = [self._span(lengths[index], 1, window, num_common) for index in members]
        most = max(num for _, num in spans)
        ids: list[int] = []
        for index, (first, _) in zip(members, spans, strict=True):
            table = layout.block_tables[index]
            own = table[first : min(first + most, -(-lengths[index] // size))]
            ids += own
            ids += [own[0]] * (most - len(own))
        positions_SL = np.arange(most * size) + np.array([[first * size] for first, _ in spans])
        last_S1 = np.array([[lengths[index] - 1] for index in members])
        mask_SL = self._mask(last_S1, positions_SL, window)
        in_order = all(starts[index] == starts[members[0]] + place for place, index in enumerate(members))
        start = starts[members[0]]
        return _Decodes(
            rows_S=slice(start, start + len(members)) if in_order else torch.tensor([starts[i] for i in members]),
            num_sequences=len(members),
            runs_R=self._runs(np.array(ids).reshape(len(members), most)),
            mask_S11L=mask_SL[:, None, None],
        )

    def _chunk(self, start: int, num_new: int, length: int, table: Sequence[int], window: int | None) -> _Chunk:
        size = self._spec.block_size
        first, num_blocks = self._span(length, num_new, window)
        ids = list(table[first : min(first + num_blocks, -(-length // size))])
        ids += [ids[0]] * (num_blocks - len(ids))
        masks = []
        for begin in range(length - num_new, length, _TILE):
            end = min(begin + _TILE, length)
            seen = end - first * size
            positions_1L = np.arange(seen + -seen % _ALIGN)[None] + first * size
            masks.append(self._mask(np.arange(begin, end)[:, None], positions_1L, window))
        return _Chunk(start, start + num_new, self._runs(np.array([ids])), masks)

    def _mask(self, queries: np.ndarray, keys: np.ndarray, window: int | None) -> torch.Tensor:
        """0 where the query position sees the key position, -inf elsewhere."""
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0))).to(self._spec.dtype)


def _scores(q_SKGH: torch.Tensor, keys: torch.Tensor, mask_S11L: torch.Tensor, scale: float) -> torch.Tensor:
    """[S, K, G, L], summed in float32 and rounded to the cache's dtype, as in transformers' eager attention."""
    sequences, heads, groups, dim = q_SKGH.shape
    scores_SKGL = mask_S11L.expand(-1, heads, groups, -1).contiguous()
    products = scores_SKGL.view(sequences * heads, groups, -1)
    products.baddbmm_(q_SKGH.reshape(-1, groups, dim), keys.reshape(-1, keys.shape[2], dim).mT, alpha=scale)
    return scores_SKGL


def _weighted(values: torch.Tensor, scores_SKGL: torch.Tensor) -> torch.Tensor:
    """[S, K, G, H]: `values` weighted by the softmax of the scores."""
    weights = scores_SKGL.softmax(-1).flatten(0, 1)
    return torch.bmm(weights, values.reshape(-1, *values.shape[2:])).view(*scores_SKGL.shape[:3], -1)


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory when they are first written; `torch.zeros` writes them all (5 GB and 20 s at start)."""
    num_bytes = prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(shape)
