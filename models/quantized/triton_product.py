"""Products of a few rows with a quantised matrix, dequantised in registers; and what goes with them: a matrix
dequantised whole, and rows of activations quantised to e4m3.

A decode step is bound by the bytes of the weights, so they are read as they are stored and widened next to the tensor
cores. Whole numbers of int4 and int8 are exact in bfloat16 and float16, so scales are applied to sums, in float32: once
a group, or once at the end. The product is computed as weights x activations, so that what is widened is the operand
that Hopper's matrix units take from registers. Where output features alone do not fill the device, the input features
are cut too, and the parts are added in a fixed order: a row's result depends on the shape of the matrix and the size
class of the batch only.

Rows above `DENSE_ROWS` are bound by arithmetic: for those the matrix is dequantised once a call, and the vendor's
product does the rest. Numbers in this file's launches are reasoned, not measured.

Legend: T rows, D input features, E output features, G groups of D, P parts of D that are added.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from models.quantized.matrix import FP8_MAX, QuantizedMatrix, unpack_nibbles

DENSE_ROWS = 256
"""From as many rows on reading and writing a dequantised matrix (4 bytes a weight) takes less than a tenth of its
product at a card's full rate, bfloat16 on Hopper; not measured."""
_PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200."""
_CHUNKS = (128, 64, 32)
_MOST_LANES = 1024


def chunk_of(bits: int, group: int) -> int | None:
    """Input features that one multiplication of the kernel takes: of one group. None where no size divides it.

    int4 lies so that the low halves of `chunk` bytes are one such run of features and the high halves the next one.
    """
    if bits == 4:
        return 64 if group % 64 == 0 else 32 if group % 32 == 0 else None
    return next((chunk for chunk in _CHUNKS if group % chunk == 0), None)


class KernelMatrix:
    """A quantised matrix as the kernels read it."""

    __slots__ = ("chunk", "group", "in_features", "nbytes", "packs", "scale_EG", "values", "zero_EG")

    def __init__(self, matrix: QuantizedMatrix):
        scheme = matrix.scheme
        self.in_features, self.packs = matrix.in_features, 8 // scheme.bits
        self.group = self.in_features // matrix.scale_EG.shape[1]
        chunk = chunk_of(scheme.bits, self.group)
        assert chunk is not None
        self.chunk = chunk
        self.values = matrix.values if self.packs == 1 else _run_by_run(matrix.values, chunk)
        self.scale_EG = matrix.scale_EG
        self.zero_EG = matrix.zero_EG
        if self.packs == 2 and self.zero_EG is None:
            self.zero_EG = torch.full_like(self.scale_EG, 8.0)
        self.nbytes = matrix.nbytes

    @property
    def out_features(self) -> int:
        return self.values.shape[0]


def multiply(
    x_TD: torch.Tensor,
    matrix: KernelMatrix,
    bias_E: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    scale_TG: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_TE of `dtype` from dense rows. `scale_TG`: of e4m3 rows, by the matrix's groups of input features."""
    num_rows, out_features = x_TD.shape[0], matrix.out_features
    assert x_TD.stride(1) == 1 and x_TD.shape[1] == matrix.in_features
    rows = min(128 if matrix.packs == 1 else 64, max(16, triton.next_power_of_2(num_rows)))
    features = 128 if rows == 128 else 64
    tiles = triton.cdiv(out_features, features) * triton.cdiv(num_rows, rows)
    num_parts = _num_parts(matrix, tiles)
    y_PTE = torch.empty(
        num_parts, num_rows, out_features, dtype=dtype if num_parts == 1 else torch.float32, device=x_TD.device
    )
    grid = (triton.cdiv(out_features, features), triton.cdiv(num_rows, rows), num_parts)
    has_bias = bias_E is not None and num_parts == 1
    _multiply[grid](
        x_TD, matrix.values, matrix.scale_EG, matrix.zero_EG, scale_TG, bias_E if has_bias else None, y_PTE,
        num_rows, out_features, x_TD.stride(0),
        width=matrix.in_features, group=matrix.group, chunk=matrix.chunk, packs=matrix.packs,
        has_zero=matrix.zero_EG is not None, scales_rows=scale_TG is not None, has_bias=has_bias,
        rows=rows, features=features, parts=num_parts,
        num_warps=4 if rows < 128 else 8, num_stages=4 if rows < 128 else 3,
    )  # fmt: skip
    if num_parts == 1:
        return y_PTE[0]
    y_TE = y_PTE.sum(0)
    return (y_TE if bias_E is None else y_TE.add_(bias_E)).to(dtype)


def dequantize(matrix: KernelMatrix, dtype: torch.dtype) -> torch.Tensor:
    """weight_ED, rounded once."""
    weight_ED = torch.empty(matrix.out_features, matrix.in_features, dtype=dtype, device=matrix.values.device)
    lanes = min(_MOST_LANES, triton.next_power_of_2(matrix.in_features))
    grid = (matrix.out_features, triton.cdiv(matrix.in_features, lanes))
    _dequantize[grid](
        matrix.values, matrix.scale_EG, matrix.zero_EG, weight_ED,
        width=matrix.in_features, group=matrix.group, chunk=matrix.chunk, packs=matrix.packs,
        has_zero=matrix.zero_EG is not None, lanes=lanes,
    )  # fmt: skip
    return weight_ED


def quantize_rows(x_TD: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_TD in e4m3 and scale_TG: each `group` of a row's features by its own greatest."""
    num_rows, width = x_TD.shape
    assert x_TD.stride(1) == 1 and width % group == 0
    y_TD = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale_TG = torch.empty(num_rows, width // group, dtype=torch.float32, device=x_TD.device)
    if num_rows:
        lanes = triton.next_power_of_2(group)
        _quantize_rows[(num_rows, width // group)](
            x_TD, y_TD, scale_TG, x_TD.stride(0), width=width, group=group, lanes=lanes, most=FP8_MAX,
            num_warps=max(1, min(8, lanes // 512)),
        )  # fmt: skip
    return y_TD, scale_TG


def _run_by_run(octets_EC: torch.Tensor, chunk: int) -> torch.Tensor:
    """int4 with neighbours in a byte → with the features `chunk` apart in a byte."""
    runs = unpack_nibbles(octets_EC).unflatten(1, (-1, 2, chunk))
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)


def _num_parts(matrix: KernelMatrix, tiles: int) -> int:
    """Into how many the input features are cut: as many as fill the device, each of four loads and more."""
    steps, parts = matrix.in_features // (matrix.chunk * matrix.packs), 1
    while parts < 8 and tiles * parts * 2 <= _PROGRAMS and steps % (parts * 2) == 0 and steps // (parts * 2) >= 4:
        parts *= 2
    return parts


@triton.jit
def _multiply(
    x_ptr, values_ptr, scale_ptr, zero_ptr, row_scale_ptr, bias_ptr, y_ptr, num_rows, out_features, x_stride,
    width: tl.constexpr, group: tl.constexpr, chunk: tl.constexpr, packs: tl.constexpr,
    has_zero: tl.constexpr, scales_rows: tl.constexpr, has_bias: tl.constexpr,
    rows: tl.constexpr, features: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """`features` output features of `rows` rows, over one part of the input features."""
    num_groups: tl.constexpr = width // group
    e = tl.program_id(0) * features + tl.arange(0, features)
    t = tl.program_id(1) * rows + tl.arange(0, rows)
    part = tl.program_id(2)
    is_e, is_t = e < out_features, t < num_rows
    k = tl.arange(0, chunk)
    values_at = values_ptr + e.to(tl.int64)[:, None] * (width // packs) + k[None, :]
    x_at = x_ptr + t.to(tl.int64)[None, :] * x_stride + k[:, None]
    groups_at = e.to(tl.int64) * num_groups
    steps: tl.constexpr = width // (chunk * packs * parts)
    total = tl.zeros((features, rows), tl.float32)
    for step in range(part * steps, part * steps + steps):
        octets = tl.load(values_at + step * chunk, mask=is_e[:, None], other=0.0)
        for half in tl.static_range(packs):
            at = (step * packs + half) * chunk
            x = tl.load(x_at + at, mask=is_t[None, :], other=0.0)
            values = octets if packs == 1 else ((octets >> (4 * half)) & 15).to(tl.float32)
            if has_zero:
                zero = tl.load(zero_ptr + groups_at + at // group, mask=is_e, other=0.0)
                values -= zero.to(tl.float32)[:, None]
            if values.dtype != x.dtype:
                values = values.to(tl.float32).to(x.dtype)
            if num_groups == 1:
                total = tl.dot(values, x, total, input_precision="ieee")
            else:
                own = tl.dot(values, x, input_precision="ieee")
                scale = tl.load(scale_ptr + groups_at + at // group, mask=is_e, other=0.0).to(tl.float32)[:, None]
                if scales_rows:
                    row_scale = tl.load(row_scale_ptr + t * num_groups + at // group, mask=is_t, other=0.0)
                    scale = scale * row_scale[None, :]
                total += own * scale
    if num_groups == 1:
        total *= tl.load(scale_ptr + e, mask=is_e, other=0.0).to(tl.float32)[:, None]
        if scales_rows:
            total *= tl.load(row_scale_ptr + t, mask=is_t, other=0.0)[None, :]
    if has_bias:
        total += tl.load(bias_ptr + e, mask=is_e, other=0.0).to(tl.float32)[:, None]
    y_at = y_ptr + (part * num_rows + t).to(tl.int64)[None, :] * out_features + e[:, None]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=is_e[:, None] & is_t[None, :])


@triton.jit
def _dequantize(
    values_ptr, scale_ptr, zero_ptr, weight_ptr,
    width: tl.constexpr, group: tl.constexpr, chunk: tl.constexpr, packs: tl.constexpr, has_zero: tl.constexpr,
    lanes: tl.constexpr,
):  # fmt: skip
    """Some features of one row."""
    e = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * lanes + tl.arange(0, lanes)
    is_d = d < width
    run = d // chunk
    values_at = values_ptr + e * (width // packs) + (run // packs) * chunk + d % chunk
    octets = tl.load(values_at, mask=is_d, other=0.0)
    values = ((octets >> (4 * (run % 2))) & 15 if packs == 2 else octets).to(tl.float32)
    groups_at = e * (width // group) + d // group
    if has_zero:
        values -= tl.load(zero_ptr + groups_at, mask=is_d, other=0.0).to(tl.float32)
    values *= tl.load(scale_ptr + groups_at, mask=is_d, other=0.0).to(tl.float32)
    tl.store(weight_ptr + e * width + d, values.to(weight_ptr.dtype.element_ty), mask=is_d)


@triton.jit
def _quantize_rows(
    x_ptr, y_ptr, scale_ptr, x_stride,
    width: tl.constexpr, group: tl.constexpr, lanes: tl.constexpr, most: tl.constexpr,
):  # fmt: skip
    """One group of one row."""
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, lanes)
    is_lane = lane < group
    x = tl.load(x_ptr + row * x_stride + index * group + lane, mask=is_lane, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30) / most
    y = tl.minimum(tl.maximum(x / scale, -most), most)
    tl.store(y_ptr + row * width + index * group + lane, y.to(tl.float8e4nv), mask=is_lane)
    tl.store(scale_ptr + row * (width // group) + index, scale)
