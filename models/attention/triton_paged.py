"""Paged attention for CUDA, in Triton: keys and values are read where they lie, block by block, nothing is gathered.

This file lays out a step and launches; `tiles.py` cuts it into work, `triton_store.py` and `triton_attend.py` hold the
kernels. A layer is one launch that writes, one or two that attend (small tiles, and chunks), and for each whose tiles
have several parts one that puts them together.

A layer's cache is [blocks, 2, K, block, H], so that the keys of a block and head lie together; quantised it is a row of
bytes a block: the same numbers in one byte each, then their scales, [2, K, block] in float32.

Legend: T tokens of the step, N query heads, K key/value heads, M = N + 2 K, H head dimension, C = H / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from models.attention import triton_attend, triton_store
from models.attention.base import KVCacheSpec, TokenLayout
from models.attention.quantized_kv import DTYPES
from models.attention.tiles import MAX_PARTS, TileSizes, cut
from models.staging import Staging

_PARTS_AT_ONCE = 16
"""Parts of a tile that the reduction adds in one go."""


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch of `attend`; the tables are those of `tiles.Launch`."""

    tiles_M6: torch.Tensor
    items_I2: torch.Tensor
    num_rows: int
    max_queries: int
    is_split: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    launches: list[_Launch]
    tokens_T2: torch.Tensor
    """int32: sequence and position of every token, the latter as the host knows it."""
    behind_S: torch.Tensor
    """int32: by how much that is too much."""
    starts_S: torch.Tensor
    """int32: where the table of each sequence begins in `blocks`."""
    blocks: torch.Tensor
    """int32: block tables, one after the other."""


class TritonAttention:
    """Paged attention by the kernels of this folder."""

    is_capturable = True
    """Plans of steps with equal numbers of tokens for every sequence, all small, differ in the content of their tensors
    and the length of block tables only: fit for graphs."""

    def __init__(self, spec: KVCacheSpec, num_heads: int, *, num_processors: int | None = None):
        """`num_processors`: multiprocessors that the work is spread over. None: those of the device."""
        self._spec = spec
        self._num_heads = num_heads
        self._num_groups = num_heads // spec.num_kv_heads
        self._padded_head = triton.next_power_of_2(spec.head_dim)
        if num_processors is None:
            is_cuda = spec.device.type == "cuda"
            num_processors = torch.cuda.get_device_properties(spec.device).multi_processor_count if is_cuda else 1
        self._sizes = _sizes(spec, self._padded_head, num_processors)
        self._nothing = torch.empty(1, dtype=torch.float32, device=spec.device)
        self._empty_table = torch.zeros(1, 6, dtype=torch.int32, device=spec.device)
        self._compiled: set[tuple[int | None, bool]] = set()
        """Windows, and whether scores are capped, for which all kernels are there."""
        self._shape = {
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "padded_head": self._padded_head,
        }

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        shape: tuple[int, ...] = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        dtype = spec.dtype
        if spec.is_quantized:
            shape, dtype = (num_blocks, spec.block_bytes // spec.num_layers), torch.uint8
        return [torch.zeros(shape, dtype=dtype, device=spec.device) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            layer[targets] = layer[sources]

    def plan(self, layout: TokenLayout, staging: Staging) -> _Plan:
        def put(values: np.ndarray) -> torch.Tensor:
            return staging.put(values, torch.int32)

        launches = [
            _Launch(put(part.tiles_M6), put(part.items_I2), part.num_rows, part.max_queries, part.is_split)
            for part in cut(layout, self._sizes, num_groups=self._num_groups, num_kv_heads=self._spec.num_kv_heads)
        ]
        num_new_S, start_S = np.array(layout.num_new), np.array(layout.num_computed)
        sequence_T = np.repeat(np.arange(len(num_new_S)), num_new_S)
        first_S = np.cumsum(num_new_S) - num_new_S
        position_T = np.arange(len(sequence_T)) + (start_S - first_S)[sequence_T]
        tokens_T2 = put(np.stack((sequence_T, position_T), 1).astype(np.int32))
        behind = layout.behind
        behind_S = put(np.zeros(len(num_new_S), np.int32)) if behind is None else staging.place(behind)
        blocks, starts_S = layout.flat_tables()
        return _Plan(launches, tokens_T2, behind_S, put(starts_S), put(blocks))

    def rotate_and_store(
        self,
        qkv_TMH: torch.Tensor,
        cis_T1C: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None,
        kv: torch.Tensor,
        plan: _Plan,
    ) -> None:
        assert qkv_TMH.stride()[1:] == (self._spec.head_dim, 1) and cis_T1C.is_contiguous()
        weight, eps = norm or (self._nothing, 0.0)
        triton_store.rotate_and_store[(len(qkv_TMH), self._spec.num_kv_heads)](
            qkv_TMH,
            torch.view_as_real(cis_T1C),
            weight,
            eps,
            *self._cache(kv),
            plan.tokens_T2,
            plan.behind_S,
            plan.starts_S,
            plan.blocks,
            qkv_TMH.stride(0),
            num_groups=self._num_groups,
            padded_groups=triton.next_power_of_2(self._num_groups),
            **self._shape,
            block_size=self._spec.block_size,
            has_norm=norm is not None,
            num_warps=1,
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
        self._store(new_T2KH, kv, plan)
        return self.attend_stored(q_TNH, kv, plan, scale=scale, window=window, softcap=softcap)

    def attend_stored(
        self,
        q_TNH: torch.Tensor,
        kv: torch.Tensor,
        plan: _Plan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        q_TNH = _with_dense_heads(q_TNH)
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        launches = plan.launches
        if (window, softcap is not None) not in self._compiled:
            launches = [*self._empty_launches(), *launches]
            self._compiled.add((window, softcap is not None))
        for launch in launches:
            self._launch(launch, q_TNH, out_TNH, kv, plan, scale, window, softcap)
        return out_TNH

    def _empty_launches(self) -> list[_Launch]:
        """One of each tile size, of an item without parts: so that kernels are compiled before requests need them."""
        sizes = {16, self._sizes.small_rows, self._sizes.chunk_rows}
        return [_Launch(self._empty_table, self._empty_table, rows, 1, False) for rows in sorted(sizes)]

    def _store(self, new_T2KH: torch.Tensor, kv: torch.Tensor, plan: _Plan) -> None:
        new_T2KH = _with_dense_heads(new_T2KH)
        triton_store.store[(len(new_T2KH), self._spec.num_kv_heads)](
            new_T2KH,
            *self._cache(kv),
            plan.tokens_T2,
            plan.behind_S,
            plan.starts_S,
            plan.blocks,
            new_T2KH.stride(0),
            new_T2KH.stride(1),
            **self._shape,
            block_size=self._spec.block_size,
            num_warps=1,
        )

    def _launch(
        self,
        launch: _Launch,
        q_TNH: torch.Tensor,
        out_TNH: torch.Tensor,
        kv: torch.Tensor,
        plan: _Plan,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        spec, num_items = self._spec, len(launch.items_I2)
        parts, lse = self._nothing, self._nothing
        if launch.is_split:
            lse = torch.empty(num_items * spec.num_kv_heads * launch.num_rows, dtype=torch.float32, device=kv.device)
            parts = torch.empty(len(lse) * spec.head_dim, dtype=torch.float32, device=kv.device)
        triton_attend.attend[(num_items, spec.num_kv_heads)](
            q_TNH,
            out_TNH,
            *self._cache(kv),
            launch.tiles_M6,
            launch.items_I2,
            plan.behind_S,
            plan.starts_S,
            plan.blocks,
            parts,
            lse,
            scale,
            softcap or 0.0,
            q_TNH.stride(0),
            num_groups=self._num_groups,
            **self._shape,
            block_size=spec.block_size,
            window=window or 0,
            has_softcap=softcap is not None,
            rows=launch.num_rows,
            **launch_options(spec, launch.num_rows),
        )
        if launch.is_split:
            num_used = launch.max_queries * self._num_groups
            triton_attend.reduce[(len(launch.tiles_M6), spec.num_kv_heads, num_used)](
                out_TNH,
                parts,
                lse,
                launch.tiles_M6,
                num_groups=self._num_groups,
                **self._shape,
                rows=launch.num_rows,
                max_parts=MAX_PARTS,
                parts_at_once=_PARTS_AT_ONCE,
                num_warps=2,
            )

    def _cache(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer as numbers, and as scales."""
        if not self._spec.is_quantized:
            return kv, kv
        return kv.view(DTYPES[self._spec.kv_dtype]), kv.view(torch.float32)


def launch_options(spec: KVCacheSpec, num_rows: int) -> dict[str, Any]:
    """Keys of an iteration, warps and stages of `attend` for tiles of so many rows.

    Chosen on paper, for Hopper: by what registers and shared memory hold without spilling (`test_triton_compiles.py`),
    and so that the iterations under way cover the latency of memory. Keys are loaded (stages - 1) / 2 iterations
    ahead, since where they lie must be loaded first. Not measured.
    """
    if spec.dtype == torch.float32:  # exact products, which only plain arithmetic units compute
        return {"keys": 16, "num_warps": 4, "num_stages": 3}
    is_wide = spec.head_dim > 128
    num_warps = 8 if num_rows >= (64 if is_wide else 128) else 4
    return {"keys": 32 if is_wide else 64, "num_warps": num_warps, "num_stages": 3 if num_rows == 64 else 5}


def _sizes(spec: KVCacheSpec, padded_head: int, num_processors: int) -> TileSizes:
    """Tiles of 16 or 64 rows run two at a time on a multiprocessor, and large ones alone."""
    if spec.dtype == torch.float32:
        return TileSizes(16, 16, 2 * num_processors, 2 * num_processors)
    return TileSizes(64, 128 if padded_head <= 128 else 64, 2 * num_processors, num_processors)


def _with_dense_heads(tensor: torch.Tensor) -> torch.Tensor:
    """Heads side by side within a token, as the kernels expect; a view of a fused projection is already so."""
    return tensor if tensor.stride()[-2:] == (tensor.shape[-1], 1) else tensor.contiguous()
