"""How the attention of a step is cut into work for the programs of a GPU. Integers only; the same for all layers.

A *tile* is some consecutive new tokens of one sequence, with the query heads that share a key head as rows of one
matrix. Sequences whose new tokens fit a small tile (decodes, drafts to verify) have one, prefill chunks are cut into
large ones; each kind is a launch. An *item* is a tile and one of the parts into which its keys are split, the work of
one program per key head (flash-decoding; Dao et al., 2023): without that a lone sequence would occupy as many
processors as it has key heads, and one with a long context would be waited for by its mates.

How many parts: `num_extra` items are shared out so that all parts are about equally long, whatever sequence they are
of (as FlashInfer balances its work; Ye et al., 2025). A launch of small tiles always has as many items as tiles and
`num_extra` together, those that are not needed are empty: steps with the same number of tokens a sequence have tables
of the same sizes, as CUDA graphs need it. Where a part begins is computed on the device, which knows a sliding window
and how many drafts were accepted; so parts are told as "the second of five".

Legend: S sequences, M tiles, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.attention.base import TokenLayout

MAX_PARTS = 128
"""Of a tile; the reduction holds a number for each."""
_STEP = 64
"""Keys of an iteration at most, of which parts are multiples."""
_LEAST_PART = 2 * _STEP
"""Keys of a part, at least; below, starting a program takes longer than its work."""
_MANY_WAVES = 16
"""With so many tiles per program slot of the device nothing is split: they even out, and no reduction is needed."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Tiles with the same number of rows."""

    tiles_M6: np.ndarray
    """int32: sequence, first token of the step, its position, number of tokens, first item, parts."""
    items_I2: np.ndarray
    """int32: tile, part. Items of a tile follow one another; an empty item has a part its tile does not have."""
    num_rows: int
    """Of a tile: tokens times query heads of a key head, padded."""
    max_queries: int
    """Tokens of a tile, at most."""
    is_split: bool
    """Tiles may have several parts, whose results must be put together."""


@dataclass(frozen=True, slots=True)
class TileSizes:
    """What fits the registers of a program, and how many programs the device computes at a time."""

    small_rows: int
    chunk_rows: int
    small_programs: int
    chunk_programs: int


def cut(layout: TokenLayout, sizes: TileSizes, *, num_groups: int, num_kv_heads: int) -> list[Launch]:
    """At most two launches: small tiles, then chunks. `num_groups`: query heads of a key head."""
    num_new_S, start_S = np.array(layout.num_new, np.int32), np.array(layout.num_computed, np.int32)
    row_S = np.cumsum(num_new_S, dtype=np.int32) - num_new_S
    is_small_S = (num_new_S == 1) | (num_new_S * num_groups <= sizes.small_rows)
    small_S, large_S = np.flatnonzero(is_small_S).astype(np.int32), np.flatnonzero(~is_small_S).astype(np.int32)
    launches = []
    if len(small_S):
        tiles = np.stack((small_S, row_S[small_S], start_S[small_S], num_new_S[small_S]), 1)
        max_queries = int(num_new_S[small_S].max())
        num_rows = _power_of_two(max_queries * num_groups)
        num_rows = 16 if num_rows <= 16 else max(num_rows, sizes.small_rows)  # few variants of a kernel to compile
        num_extra = sizes.small_programs // num_kv_heads
        launches.append(_split(tiles, num_rows, max_queries, num_extra, pads=True, may_reduce=not len(large_S)))
    if len(large_S):
        max_queries = max(1, sizes.chunk_rows // num_groups)
        tiles = _chunks(large_S, num_new_S[large_S], row_S[large_S], start_S[large_S], max_queries)
        num_rows = max(sizes.chunk_rows, _power_of_two(num_groups))
        num_extra = sizes.chunk_programs // num_kv_heads
        launches.append(_split(tiles, num_rows, max_queries, num_extra, pads=False, may_reduce=False))
    return launches


def _chunks(
    sequence_S: np.ndarray, num_new_S: np.ndarray, row_S: np.ndarray, start_S: np.ndarray, size: int
) -> np.ndarray:
    """Tiles of `size` tokens, those with the most keys first: the last ones to end are then short."""
    num_S = -(-num_new_S // size)
    of_M = np.repeat(np.arange(len(num_S)), num_S)
    offset_M = (np.arange(len(of_M)) - (np.cumsum(num_S) - num_S)[of_M]) * size
    num_M = np.minimum(size, num_new_S[of_M] - offset_M)
    tiles = np.stack((sequence_S[of_M], row_S[of_M] + offset_M, start_S[of_M] + offset_M, num_M), 1).astype(np.int32)
    return tiles[np.argsort(-(tiles[:, 2] + tiles[:, 3]), kind="stable")]


def _split(
    tiles_M4: np.ndarray, num_rows: int, max_queries: int, num_extra: int, *, pads: bool, may_reduce: bool
) -> Launch:
    """`pads`: as many items as any such tiles could need. `may_reduce`: then the reduction is always launched, too."""
    num_tiles = len(tiles_M4)
    if num_tiles >= _MANY_WAVES * num_extra:
        num_extra = 0
    length_M = tiles_M4[:, 2] + tiles_M4[:, 3]
    # With parts of total / extra keys, a part begun in vain per tile is the most that there can be too many.
    part = max(_LEAST_PART, -(-int(length_M.sum()) // (num_extra * _STEP)) * _STEP) if num_extra else 1 << 30
    parts_M = np.minimum(-(-length_M // part), MAX_PARTS).astype(np.int32)
    first_M = np.cumsum(parts_M, dtype=np.int32) - parts_M
    tile_I = np.repeat(np.arange(num_tiles, dtype=np.int32), parts_M)
    items_I2 = np.stack((tile_I, np.arange(len(tile_I), dtype=np.int32) - first_M[tile_I]), 1)
    if pads:
        empty = np.full((num_tiles + num_extra - len(items_I2), 2), (0, MAX_PARTS), np.int32)
        items_I2 = np.concatenate((items_I2, empty))
    is_split = bool(num_extra) if may_reduce else bool(parts_M.max() > 1)
    tiles_M6 = np.concatenate((tiles_M4, first_M[:, None], parts_M[:, None]), 1)
    return Launch(tiles_M6, items_I2, num_rows, max_queries, is_split)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
