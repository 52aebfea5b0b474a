"""Paged attention for CUDA, in Triton: keys and values are read where they lie, block by block, nothing is gathered.

One program computes one tile: some consecutive queries of one sequence, for the G query heads that share a key head, as
the rows of one matrix. Decodes are tiles of one query, prefill chunks are cut into tiles; the two kinds are launched
with different tile sizes and the same code. The running softmax is FlashAttention's (Dao et al., 2022), the block table
PagedAttention's (Kwon et al., 2023). A program walks its whole context alone: few sequences with very long contexts
would want it split over several programs, which is not done.

A layer's cache is [blocks, 2, K, block, H], so that the keys of a block and head lie together. Offsets into it are 64
bits: a cache larger than 2^31 elements is an ordinary one.

Legend: T tokens of the step, N query heads, K key/value heads, G = N / K, H head dimension, M rows of a tile, S keys
of an iteration.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of kernels are pointers and numbers of a compiler, not Python values)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from models.attention.base import KVCacheSpec, TokenLayout

_ROWS = 64
"""Rows of a prefill tile (queries times heads of a group)."""
_KEYS = 32
"""Keys of an iteration."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of one launch: int32 [5, tiles]: sequence, first row, first position, number of queries, and their end."""

    table: torch.Tensor
    num_queries: int
    """The most queries of a tile."""


@dataclass(frozen=True, slots=True)
class _Plan:
    slots_T: torch.Tensor
    block_tables: torch.Tensor
    """int32 [sequences, most blocks]"""
    launches: list[_Tiles]


class TritonAttention:
    """Paged attention by the two kernels below."""

    is_capturable = True
    """Plans of decodes differ in the content of their tensors and the width of block tables only: fit for graphs."""

    def __init__(self, spec: KVCacheSpec, num_heads: int):
        self._spec = spec
        self._num_heads = num_heads
        self._num_groups = num_heads // spec.num_kv_heads

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return [torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            layer[targets] = layer[sources]

    def plan(self, layout: TokenLayout) -> _Plan:
        size, device = self._spec.block_size, self._spec.device
        tile = max(1, _ROWS // self._num_groups)
        decodes: list[tuple[int, int, int, int]] = []
        chunks: list[tuple[int, int, int, int]] = []
        row = 0
        for index, (num_new, start) in enumerate(zip(layout.num_new, layout.num_computed, strict=True)):
            if num_new == 1:
                decodes.append((index, row, start, 1))
            else:
                chunks += [
                    (index, row + first, start + first, min(tile, num_new - first)) for first in range(0, num_new, tile)
                ]
            row += num_new
        most = max(-(-(new + start) // size) for new, start in zip(layout.num_new, layout.num_computed, strict=True))
        padded = [list(table[:most]) + [0] * (most - len(table)) for table in layout.block_tables]
        return _Plan(
            torch.tensor(layout.slots(size)).to(device, non_blocking=True),
            torch.tensor(padded, dtype=torch.int32).to(device, non_blocking=True),
            [
                _Tiles(torch.tensor(tiles, dtype=torch.int32).t().contiguous().to(device, non_blocking=True), queries)
                for tiles, queries in ((decodes, 1), (chunks, tile))
                if tiles
            ],
        )

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
        spec = self._spec
        padded_head = triton.next_power_of_2(spec.head_dim)
        q_TNH, k_TKH, v_TKH = (_with_dense_heads(tensor) for tensor in (q_TNH, *new_T2KH.unbind(1)))
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        _store[(q_TNH.shape[0], spec.num_kv_heads)](
            k_TKH,
            v_TKH,
            kv,
            plan.slots_T,
            k_TKH.stride(0),
            v_TKH.stride(0),
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            padded_head=padded_head,
            block_size=spec.block_size,
        )
        for tiles in plan.launches:
            _attend[(tiles.table.shape[1], spec.num_kv_heads)](
                q_TNH,
                out_TNH,
                kv,
                plan.block_tables,
                tiles.table,
                scale,
                softcap or 0.0,
                q_TNH.stride(0),
                plan.block_tables.stride(0),
                tiles.table.stride(0),
                num_groups=self._num_groups,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                padded_head=padded_head,
                block_size=spec.block_size,
                window=window or 0,
                has_softcap=softcap is not None,
                rows=max(16, triton.next_power_of_2(tiles.num_queries * self._num_groups)),
                keys=_KEYS,
            )
        return out_TNH


def _with_dense_heads(tensor: torch.Tensor) -> torch.Tensor:
    """Heads side by side within a token, as the kernels expect; a view of a fused projection is already so."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


@triton.jit
def _store(
    k_ptr,
    v_ptr,
    kv_ptr,
    slots_ptr,
    k_stride,
    v_stride,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_head: tl.constexpr,
    block_size: tl.constexpr,
):
    """Write the new key and value of one token and head to their slot."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    lane = tl.arange(0, padded_head)
    is_lane = lane < head_dim
    key_at = slot // block_size * (2 * num_kv_heads * block_size * head_dim)
    key_at += (head * block_size + slot % block_size) * head_dim
    value_at = key_at + num_kv_heads * block_size * head_dim
    key = tl.load(k_ptr + token * k_stride + head * head_dim + lane, mask=is_lane)
    value = tl.load(v_ptr + token * v_stride + head * head_dim + lane, mask=is_lane)
    tl.store(kv_ptr + key_at + lane, key, mask=is_lane)
    tl.store(kv_ptr + value_at + lane, value, mask=is_lane)


@triton.jit
def _attend(
    q_ptr,
    out_ptr,
    kv_ptr,
    tables_ptr,
    tiles_ptr,
    scale,
    softcap,
    q_stride,
    tables_stride,
    tiles_stride,
    num_groups: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_head: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    has_softcap: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
):
    """One tile of queries for one key head: read its keys and values once, with a running softmax."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(tiles_ptr + tile).to(tl.int64)
    first_row = tl.load(tiles_ptr + tiles_stride + tile).to(tl.int64)
    first_position = tl.load(tiles_ptr + 2 * tiles_stride + tile)
    num_queries = tl.load(tiles_ptr + 3 * tiles_stride + tile)

    row = tl.arange(0, rows)
    query = row // num_groups
    lane = tl.arange(0, padded_head)
    is_lane = lane < head_dim
    is_query = (query < num_queries)[:, None] & is_lane[None, :]
    position_M = first_position + query
    head_at = (head * num_groups + row % num_groups) * head_dim
    q_MH = tl.load(
        q_ptr + ((first_row + query) * q_stride + head_at)[:, None] + lane[None, :], mask=is_query, other=0.0
    )

    length = first_position + num_queries
    begin = 0
    if window > 0:
        begin = tl.maximum(first_position - window + 1, 0) // keys * keys
    best_M = tl.full([rows], float("-inf"), tl.float32)
    total_M = tl.zeros([rows], tl.float32)
    sum_MH = tl.zeros([rows, padded_head], tl.float32)
    for start in range(begin, length, keys):
        place_S = start + tl.arange(0, keys)
        is_key = place_S < length
        block = tl.load(tables_ptr + sequence * tables_stride + place_S // block_size, mask=is_key, other=0)
        key_at = block.to(tl.int64) * (2 * num_kv_heads * block_size * head_dim)
        key_at += (head * block_size + place_S % block_size) * head_dim
        value_at = key_at + num_kv_heads * block_size * head_dim
        is_there = is_key[:, None] & is_lane[None, :]
        k_SH = tl.load(kv_ptr + key_at[:, None] + lane[None, :], mask=is_there, other=0.0)
        v_SH = tl.load(kv_ptr + value_at[:, None] + lane[None, :], mask=is_there, other=0.0)
        score_MS = tl.dot(q_MH, tl.trans(k_SH), input_precision="ieee") * scale
        if has_softcap:
            score_MS = softcap * (2 * tl.sigmoid(2 * score_MS / softcap) - 1)
        is_seen = is_key[None, :] & (place_S[None, :] <= position_M[:, None])
        if window > 0:
            is_seen = is_seen & (place_S[None, :] > position_M[:, None] - window)
        score_MS = tl.where(is_seen, score_MS, float("-inf"))
        # A row that has seen no key yet keeps -inf as its best; 0 instead avoids -inf - -inf.
        better_M = tl.maximum(best_M, tl.max(score_MS, 1))
        base_M = tl.where(better_M == float("-inf"), 0.0, better_M)
        weight_MS = tl.exp(score_MS - base_M[:, None])
        decay_M = tl.exp(best_M - base_M)
        total_M = total_M * decay_M + tl.sum(weight_MS, 1)
        sum_MH = sum_MH * decay_M[:, None]
        sum_MH += tl.dot(weight_MS.to(v_SH.dtype), v_SH, input_precision="ieee")
        best_M = better_M
    out_MH = sum_MH / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    out_at = (first_row + query) * (num_kv_heads * num_groups * head_dim) + head_at
    tl.store(out_ptr + out_at[:, None] + lane[None, :], out_MH.to(out_ptr.dtype.element_ty), mask=is_query)
