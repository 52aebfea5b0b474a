"""Kernels that attend over the paged cache: `attend` computes an item, `reduce` puts the parts of a tile together.

One family for all that a step holds. An item (`tiles.py`) is a tile of queries and a part of its keys: decodes are
tiles of one token, drafts to verify of a few, prefill chunks are cut into large ones, and any of them may be split. The
running softmax is FlashAttention's (Dao et al., 2022), in base 2; the block table PagedAttention's (Kwon et al., 2023);
parts are joined by their log-sum-exp as in flash-decoding.

Keys are read where they lie, some whole blocks at a time, each row's H numbers side by side. What is not there is never
used: keys behind the end of a sequence are read as zeros, so a slot may hold anything, NaN too. A sliding window skips
what lies before it. Iterations that every row sees wholly, nearly all of a prefill's, are computed without masks.

Quantised keys and values become numbers without their scales in the tile's dtype, which is exact; the scale of a key
multiplies a column of scores, that of a value a column of weights.

Offsets into the cache are 64 bits: one of more than 2^31 elements is ordinary.

Legend: N query heads, K key/value heads, G = N / K, H head dimension, M rows of a tile, S keys of an iteration, P parts
of a tile.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of kernels are pointers and numbers of a compiler, not Python values)

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    q_ptr,
    out_ptr,
    kv_ptr,
    scales_ptr,
    tiles_ptr,
    items_ptr,
    behind_ptr,
    starts_ptr,
    blocks_ptr,
    parts_ptr,
    lse_ptr,
    scale,
    softcap,
    q_stride,
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
    """An item for one key head. The only part of a tile writes the output, else each its mean and log-sum-exp."""
    item, head = tl.program_id(0), tl.program_id(1)
    tile = tl.load(items_ptr + 2 * item)
    part = tl.load(items_ptr + 2 * item + 1)
    num_parts = tl.load(tiles_ptr + 6 * tile + 5)
    if part >= num_parts:
        return
    sequence = tl.load(tiles_ptr + 6 * tile)
    first_token = tl.load(tiles_ptr + 6 * tile + 1).to(tl.int64)
    first = tl.load(tiles_ptr + 6 * tile + 2) - tl.load(behind_ptr + sequence)
    num_queries = tl.load(tiles_ptr + 6 * tile + 3)
    table_ptr = blocks_ptr + tl.load(starts_ptr + sequence)

    row = tl.arange(0, rows)
    query = row // num_groups
    lane = tl.arange(0, padded_head)
    is_query = (query < num_queries)[:, None] & (lane < head_dim)[None, :]
    head_at = (head * num_groups + row % num_groups) * head_dim
    q_at = ((first_token + query) * q_stride + head_at)[:, None] + lane[None, :]
    q_MH = tl.load(q_ptr + q_at, mask=is_query, other=0.0)
    position_M = first + query

    # The keys of this part, in whole iterations: | some rows see them | all rows see them all | some rows see them |
    length = first + num_queries
    begin = 0
    if window > 0:
        begin = tl.maximum(first - window + 1, 0) // keys * keys
    share = tl.cdiv(tl.cdiv(length - begin, keys), num_parts) * keys
    whole = begin
    if window > 0:
        whole = tl.cdiv(tl.maximum(length - window, 0), keys) * keys
    begin += part * share
    end = tl.minimum(begin + share, length)
    end = tl.maximum(begin, end)
    whole = tl.minimum(tl.maximum(whole, begin), end)
    whole_end = tl.maximum(whole, tl.minimum((first + 1) // keys * keys, end // keys * keys))

    best_M = tl.full([rows], float("-inf"), tl.float32)
    total_M = tl.zeros([rows], tl.float32)
    sum_MH = tl.zeros([rows, padded_head], tl.float32)
    if window > 0:
        sum_MH, total_M, best_M = _walk(
            sum_MH, total_M, best_M, q_MH, position_M, kv_ptr, scales_ptr, table_ptr, head, begin, whole, length,
            scale, softcap, num_kv_heads, head_dim, padded_head, block_size, window, has_softcap, keys, True,
        )  # fmt: skip
    sum_MH, total_M, best_M = _walk(
        sum_MH, total_M, best_M, q_MH, position_M, kv_ptr, scales_ptr, table_ptr, head, whole, whole_end, length,
        scale, softcap, num_kv_heads, head_dim, padded_head, block_size, window, has_softcap, keys, False,
    )  # fmt: skip
    sum_MH, total_M, best_M = _walk(
        sum_MH, total_M, best_M, q_MH, position_M, kv_ptr, scales_ptr, table_ptr, head, whole_end, end, length,
        scale, softcap, num_kv_heads, head_dim, padded_head, block_size, window, has_softcap, keys, True,
    )  # fmt: skip

    mean_MH = sum_MH / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    if num_parts == 1:
        out_at = (first_token + query) * (num_kv_heads * num_groups * head_dim) + head_at
        tl.store(out_ptr + out_at[:, None] + lane[None, :], mean_MH.to(out_ptr.dtype.element_ty), mask=is_query)
    else:
        part_at = (item.to(tl.int64) * num_kv_heads + head) * rows + row
        tl.store(parts_ptr + part_at[:, None] * head_dim + lane[None, :], mean_MH, mask=is_query)
        tl.store(lse_ptr + part_at, best_M + tl.log2(total_M), mask=query < num_queries)


@triton.jit
def _walk(
    sum_MH,
    total_M,
    best_M,
    q_MH,
    position_M,
    kv_ptr,
    scales_ptr,
    table_ptr,
    head,
    begin,
    end,
    length,
    scale,
    softcap,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_head: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    has_softcap: tl.constexpr,
    keys: tl.constexpr,
    is_masked: tl.constexpr,
):
    """The softmax's running sums with the keys from `begin` to `end`, where an iteration begins at a multiple of S.

    `is_masked`: not every row sees every key, and the last ones may lie behind the end of the sequence.
    """
    num_slots: tl.constexpr = 2 * num_kv_heads * block_size
    is_quantized: tl.constexpr = kv_ptr.dtype.element_ty.primitive_bitwidth == 8
    block_stride: tl.constexpr = num_slots * (head_dim + 4 if is_quantized else head_dim)
    precision: tl.constexpr = "ieee" if q_MH.dtype == tl.float32 else "tf32"
    lane = tl.arange(0, padded_head)
    is_lane = (lane < head_dim)[None, :]
    for start in tl.range(begin, end, keys):
        place_S = start + tl.arange(0, keys)
        is_key = place_S < length
        block_S = tl.load(table_ptr + place_S // block_size, mask=is_key, other=0).to(tl.int64)
        slot_S = head * block_size + place_S % block_size
        key_at = (block_S * block_stride + slot_S * head_dim)[:, None] + lane[None, :]
        value_at = key_at + num_slots // 2 * head_dim
        if is_masked:
            k_SH = tl.load(kv_ptr + key_at, mask=is_key[:, None] & is_lane, other=0.0)
            v_SH = tl.load(kv_ptr + value_at, mask=is_key[:, None] & is_lane, other=0.0)
        elif padded_head != head_dim:
            k_SH = tl.load(kv_ptr + key_at, mask=is_lane, other=0.0)
            v_SH = tl.load(kv_ptr + value_at, mask=is_lane, other=0.0)
        else:
            k_SH = tl.load(kv_ptr + key_at)
            v_SH = tl.load(kv_ptr + value_at)
        score_MS = tl.dot(q_MH, tl.trans(k_SH.to(q_MH.dtype)), input_precision=precision) * scale
        if is_quantized:
            scale_at = block_S * (block_stride // 4) + num_slots * head_dim // 4 + slot_S
            score_MS *= tl.load(scales_ptr + scale_at, mask=is_key, other=0.0)[None, :]
            v_scale_S = tl.load(scales_ptr + scale_at + num_slots // 2, mask=is_key, other=0.0)
        if has_softcap:
            score_MS = softcap * (2 * tl.sigmoid(2 * score_MS / softcap) - 1)
        score_MS *= _LOG2_E
        if is_masked:
            is_seen = is_key[None, :] & (place_S[None, :] <= position_M[:, None])
            if window > 0:
                is_seen = is_seen & (place_S[None, :] > position_M[:, None] - window)
            score_MS = tl.where(is_seen, score_MS, float("-inf"))
        # A row that has seen no key yet keeps -inf as its best; 0 instead avoids -inf - -inf.
        better_M = tl.maximum(best_M, tl.max(score_MS, 1))
        base_M = tl.where(better_M == float("-inf"), 0.0, better_M)
        weight_MS = tl.exp2(score_MS - base_M[:, None])
        decay_M = tl.exp2(best_M - base_M)
        total_M = total_M * decay_M + tl.sum(weight_MS, 1)
        if is_quantized:
            weight_MS *= v_scale_S[None, :]
        sum_MH = sum_MH * decay_M[:, None]
        sum_MH = tl.dot(weight_MS.to(q_MH.dtype), v_SH.to(q_MH.dtype), sum_MH, input_precision=precision)
        best_M = better_M
    return sum_MH, total_M, best_M


@triton.jit
def reduce(
    out_ptr,
    parts_ptr,
    lse_ptr,
    tiles_ptr,
    num_groups: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_head: tl.constexpr,
    rows: tl.constexpr,
    max_parts: tl.constexpr,
    parts_at_once: tl.constexpr,
):
    """One row of a tile: the mean of its parts, weighted by what each has seen. Tiles of one part are done already."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_queries = tl.load(tiles_ptr + 6 * tile + 3)
    num_parts = tl.load(tiles_ptr + 6 * tile + 5)
    if (num_parts == 1) | (row >= num_queries * num_groups):
        return
    first_token = tl.load(tiles_ptr + 6 * tile + 1).to(tl.int64)
    first_item = tl.load(tiles_ptr + 6 * tile + 4).to(tl.int64)
    lane = tl.arange(0, padded_head)
    first_at = (first_item * num_kv_heads + head) * rows + row
    all_P = tl.arange(0, max_parts)
    lse_P = tl.load(lse_ptr + first_at + all_P * num_kv_heads * rows, mask=all_P < num_parts, other=float("-inf"))
    best = tl.max(lse_P, 0)
    total = tl.sum(tl.exp2(lse_P - best), 0)
    sum_H = tl.zeros([padded_head], tl.float32)
    for begin in range(0, num_parts, parts_at_once):
        part_P = begin + tl.arange(0, parts_at_once)
        at_P = first_at + part_P * num_kv_heads * rows
        weight_P = tl.exp2(tl.load(lse_ptr + at_P, mask=part_P < num_parts, other=float("-inf")) - best)
        is_there = (part_P < num_parts)[:, None] & (lane < head_dim)[None, :]
        mean_PH = tl.load(parts_ptr + at_P[:, None] * head_dim + lane[None, :], mask=is_there, other=0.0)
        sum_H += tl.sum(mean_PH * weight_P[:, None], 0)
    out_at = (first_token + row // num_groups) * (num_kv_heads * num_groups * head_dim)
    out_at += (head * num_groups + row % num_groups) * head_dim
    tl.store(out_ptr + out_at + lane, (sum_H / total).to(out_ptr.dtype.element_ty), mask=lane < head_dim)
