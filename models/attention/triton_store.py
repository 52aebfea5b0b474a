"""Kernels that write a step's keys and values to the cache: as they come, or normed and rotated on the way.

The fused one takes what the projection gave, queries, keys and values side by side, and does in one pass what would be
six: norm of queries and keys (Qwen3), rotation, rounding, quantising, and writing to the blocks. Rotary pairs lie side
by side (`models/text/rope.py`).

Where a token goes is computed on the device, from its sequence, its position and its block table, for the host may not
know the position yet (`TokenLayout.behind`).

Legend: T tokens, N query heads, K key/value heads, G = N / K, H head dimension.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of kernels are pointers and numbers of a compiler, not Python values)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store(
    new_ptr,
    kv_ptr,
    scales_ptr,
    tokens_ptr,
    behind_ptr,
    starts_ptr,
    blocks_ptr,
    token_stride,
    value_offset,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_head: tl.constexpr,
    block_size: tl.constexpr,
):
    """The key and the value of one token and head. `value_offset`: from a token's keys to its values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, place = _slot(tokens_ptr, behind_ptr, starts_ptr, blocks_ptr, token, block_size)
    lane = tl.arange(0, padded_head)
    is_lane = lane < head_dim
    at = new_ptr + token * token_stride + head * head_dim + lane
    key = tl.load(at, mask=is_lane, other=0.0)
    value = tl.load(at + value_offset, mask=is_lane, other=0.0)
    num_slots: tl.constexpr = 2 * num_kv_heads * block_size
    slot = head * block_size + place
    _write(key, kv_ptr, scales_ptr, block, slot, lane, num_slots, head_dim)
    _write(value, kv_ptr, scales_ptr, block, slot + num_slots // 2, lane, num_slots, head_dim)


@triton.jit
def rotate_and_store(
    qkv_ptr,
    cis_ptr,
    norm_ptr,
    eps,
    kv_ptr,
    scales_ptr,
    tokens_ptr,
    behind_ptr,
    starts_ptr,
    blocks_ptr,
    token_stride,
    num_groups: tl.constexpr,
    padded_groups: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_head: tl.constexpr,
    block_size: tl.constexpr,
    has_norm: tl.constexpr,
):
    """One token and key head: the G queries in place, the key and the value to the cache. Computed in float32."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, place = _slot(tokens_ptr, behind_ptr, starts_ptr, blocks_ptr, token, block_size)
    lane = tl.arange(0, padded_head)
    is_lane = lane < head_dim
    cis = tl.load(cis_ptr + token * head_dim + lane, mask=is_lane, other=0.0)
    cos, sin = tl.split(tl.reshape(cis, [1, padded_head // 2, 2]))
    token_ptr = qkv_ptr + token * token_stride

    group = tl.arange(0, padded_groups)
    query_at = (head * num_groups + group)[:, None] * head_dim + lane[None, :]
    is_query = (group < num_groups)[:, None] & is_lane[None, :]
    q_GH = tl.load(token_ptr + query_at, mask=is_query, other=0.0).to(tl.float32)
    if has_norm:
        q_GH = _normed(q_GH, tl.load(norm_ptr + query_at, mask=is_query, other=0.0), eps, head_dim)
    q_GH = _rotated(q_GH, cos, sin, padded_groups, padded_head)
    tl.store(token_ptr + query_at, q_GH.to(qkv_ptr.dtype.element_ty), mask=is_query)

    key_at = (num_kv_heads * num_groups + head) * head_dim + lane
    k_1H = tl.load(token_ptr + key_at, mask=is_lane, other=0.0).to(tl.float32)[None, :]
    if has_norm:
        k_1H = _normed(k_1H, tl.load(norm_ptr + key_at, mask=is_lane, other=0.0)[None, :], eps, head_dim)
    key = tl.reshape(_rotated(k_1H, cos, sin, 1, padded_head), [padded_head]).to(qkv_ptr.dtype.element_ty)
    value = tl.load(token_ptr + key_at + num_kv_heads * head_dim, mask=is_lane, other=0.0)
    num_slots: tl.constexpr = 2 * num_kv_heads * block_size
    slot = head * block_size + place
    _write(key, kv_ptr, scales_ptr, block, slot, lane, num_slots, head_dim)
    _write(value, kv_ptr, scales_ptr, block, slot + num_slots // 2, lane, num_slots, head_dim)


@triton.jit
def _slot(tokens_ptr, behind_ptr, starts_ptr, blocks_ptr, token, block_size: tl.constexpr):
    """Block (64 bits) and place in it of a token, from its sequence and position."""
    sequence = tl.load(tokens_ptr + 2 * token)
    position = tl.load(tokens_ptr + 2 * token + 1) - tl.load(behind_ptr + sequence)
    block = tl.load(blocks_ptr + tl.load(starts_ptr + sequence) + position // block_size)
    return block.to(tl.int64), position % block_size


@triton.jit
def _normed(x_RH, weight_RH, eps, head_dim: tl.constexpr):
    rms_R = tl.sqrt(tl.sum(x_RH * x_RH, 1) / head_dim + eps)
    return x_RH / rms_R[:, None] * weight_RH.to(tl.float32)


@triton.jit
def _rotated(x_RH, cos_1C, sin_1C, rows: tl.constexpr, padded_head: tl.constexpr):
    """Pairs side by side, each a complex number times (cos, sin)."""
    real_RC, imaginary_RC = tl.split(tl.reshape(x_RH, [rows, padded_head // 2, 2]))
    turned = tl.join(real_RC * cos_1C - imaginary_RC * sin_1C, real_RC * sin_1C + imaginary_RC * cos_1C)
    return tl.reshape(turned, [rows, padded_head])


@triton.jit
def _write(row, kv_ptr, scales_ptr, block, slot, lane, num_slots: tl.constexpr, head_dim: tl.constexpr):
    """A key or value to its slot of the block's `num_slots`, quantised as `quantized_kv.py` does it."""
    kind: tl.constexpr = kv_ptr.dtype.element_ty
    is_quantized: tl.constexpr = kind.primitive_bitwidth == 8
    block_stride: tl.constexpr = num_slots * (head_dim + 4 if is_quantized else head_dim)
    if is_quantized:
        x = row.to(tl.float32)
        largest = tl.max(tl.abs(x), 0)
        most: tl.constexpr = 127.0 if kind == tl.int8 else 448.0
        scale = tl.where(largest < 1e-30, 1.0, tl.math.div_rn(largest, tl.full([], most, tl.float32)))
        x = tl.math.div_rn(x, tl.zeros_like(x) + scale)
        row = tl.floor(x + 0.5) if kind == tl.int8 else _rounded_to_e4m3(x)
        # A row that is not finite must stay so: the sum of 0 * x is NaN then.
        scale_at = block * (block_stride // 4) + num_slots * head_dim // 4 + slot
        tl.store(scales_ptr + scale_at, scale + tl.sum(row * 0.0, 0))
    at = block * block_stride + slot * head_dim + lane
    tl.store(kv_ptr + at, row.to(kind), mask=lane < head_dim)


@triton.jit
def _rounded_to_e4m3(x):
    """Float32 rounded, to nearest and even, to what e4m3 can hold, so that every device and Triton's interpreter store
    the same (the interpreter's own conversion makes 64 of 127)."""
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    size = tl.abs(x)
    subnormal = (size + 24576.0) - 24576.0  # numbers from 2^14 to 2^15 are 2^-9 apart, as e4m3's below 2^-6
    return tl.where(size < 0.015625, tl.where(x < 0, -subnormal, subnormal), normal.to(tl.float32, bitcast=True))
