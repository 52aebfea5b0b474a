"""Quantised products on CPU, by the kernels torch has: oneDNN's int8 (AMX, VNNI) and torch's own int4.

int8 weights, activations to 15 bits: every row of activations is written as 128 * high + low in units of its greatest
/ 16256, and both int8 halves are multiplied, for few rows at once, stacked. Sums of whole numbers are exact, so a row's
result does not depend on its batch in any dtype, which bfloat16 products cannot promise; and half the bytes are read.
Microseconds of a product of 4096 x 1024, two threads, weights out of memory (Xeon with AMX, torch 2.13):

    rows                            1      4     32     64    128    512
    bfloat16, packed              404    449    508    510    726   2306
    int8 halves                   332    368    671    919   1486   5253
    _weight_int4pack_mm           203    350   2301

So on a machine with AMX both are for few sequences and for memory; its bfloat16 is faster for many rows. torch's
`_weight_int8pack_mm` is slower than the halves from 4 rows on, and takes six times as long for 32.

fp8 has no kernel worth the name here: oneDNN's takes thirty times as long as bfloat16.

Legend: T rows, D input features, E output features, G groups of input features, K blocks of 64 output features.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from models.quantized.matrix import QuantizedMatrix, unpack_nibbles

HALF = 128
"""Of a whole number up to 127 * 128 the high half is it divided by this, rounded; the low half is in [-64, 64]."""
MOST = 127 * HALF

SPLIT_ROWS = 256
"""Rows from which on the halves are multiplied one after the other, the second added to the first in its last pass:
weights are read twice, results (float32, twice the rows) moved less. 5253 against 8767 us for 512 rows, above."""
INT4_ROWS = 32
"""Rows up to which torch's int4 kernel is called; it takes as long for each. Above, the matrix is dequantised for the
call, which takes about as long as 40 rows."""
_BLOCK = 64
_INNER_K_TILES = 2  # ignored on CPU


@cache
def multiplies_int8() -> bool:
    """Whether sums of products of int8 numbers are exact here: without VNNI oneDNN may add in 16 bits."""
    if not hasattr(_onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return False
    most = torch.full((64, 64), 127, dtype=torch.int8)
    try:
        packed = _onednn.qlinear_prepack(most, None)
        y = _multiply_int8(most, packed, torch.ones(64), torch.zeros(64, dtype=torch.int32))
    except RuntimeError:
        return False
    return bool((y == 64.0 * 127 * 127).all())


def multiplies_int4(out_features: int, group: int) -> bool:
    """Whether torch's int4 kernel takes such a matrix, and its layout is one this file can read back."""
    return group in (32, 64, 128, 256) and out_features % _BLOCK == 0 and _nibble_order() is not None


class Int8Product:
    """Rows of int8 with a scale each."""

    __slots__ = ("_no_zero_E", "_scale_E", "_weight", "nbytes")

    def __init__(self, matrix: QuantizedMatrix):
        self._weight = _onednn.qlinear_prepack(matrix.values, None)
        self._scale_E = matrix.scale_EG.flatten()
        self._no_zero_E = torch.zeros(len(self._scale_E), dtype=torch.int32)
        self.nbytes = matrix.nbytes

    def __call__(self, x_TD: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        num_rows, x32_TD = x_TD.shape[0], x_TD.float()
        unit_T1 = torch.linalg.vector_norm(x32_TD, float("inf"), dim=1, keepdim=True).div_(MOST).clamp_(min=1e-35)
        whole_TD = torch.div(x32_TD, unit_T1).round_()
        high_TD = torch.mul(whole_TD, 1 / HALF).round_()
        halves = torch.empty(2, *x_TD.shape, dtype=torch.int8)
        halves[0].copy_(high_TD)
        halves[1].copy_(whole_TD.sub_(high_TD, alpha=HALF))
        given = self._weight, self._scale_E, self._no_zero_E
        if num_rows < SPLIT_ROWS:
            both_TE = _multiply_int8(halves.view(2 * num_rows, -1), *given)
            y_TE = both_TE[num_rows:].add_(both_TE[:num_rows], alpha=HALF)
        else:
            y_TE = _add_int8(_multiply_int8(halves[0], *given, factor=float(HALF)), halves[1], *given)
        if bias_E is not None:
            return y_TE.mul_(unit_T1).add_(bias_E).to(x_TD.dtype)
        return torch.mul(y_TE, unit_T1, out=torch.empty(y_TE.shape, dtype=x_TD.dtype))


class Int4Product:
    """Groups of int4 with a scale and a zero point each, in torch's own layout."""

    __slots__ = ("_group", "_scale_zero_GE2", "_weight", "nbytes")

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype):
        values = unpack_nibbles(matrix.values)
        self._weight = torch._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), _INNER_K_TILES)
        zero_EG = 8.0 if matrix.zero_EG is None else matrix.zero_EG.float()
        scale_EG = matrix.scale_EG.float()
        # The kernel computes (value - 8) * scale + zero.
        both = torch.stack((scale_EG, (8.0 - zero_EG) * scale_EG), dim=-1)
        self._scale_zero_GE2 = both.transpose(0, 1).to(dtype).contiguous()
        self._group = matrix.in_features // scale_EG.shape[1]
        self.nbytes = self._weight.nbytes + self._scale_zero_GE2.nbytes

    def __call__(self, x_TD: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        if x_TD.shape[0] <= INT4_ROWS:
            y_TE = torch._weight_int4pack_mm_for_cpu(x_TD, self._weight, self._group, self._scale_zero_GE2)
            return y_TE if bias_E is None else y_TE.add_(bias_E)
        weight_DE = self._dequantize()
        return x_TD @ weight_DE if bias_E is None else torch.addmm(bias_E, x_TD, weight_DE)

    def _dequantize(self) -> torch.Tensor:
        """weight_DE in the dtype of the scales, from blocks of 64 output features whose rows are input features."""
        num_groups, out_features, _ = self._scale_zero_GE2.shape
        octets_DKC = self._weight.view(out_features // _BLOCK, -1, _BLOCK // 2).transpose(0, 1)
        values_DKB = octets_DKC.new_empty(*octets_DKC.shape[:2], _BLOCK)
        torch.bitwise_and(octets_DKC, 15, out=values_DKB[..., : _BLOCK // 2])
        torch.bitwise_right_shift(octets_DKC, 4, out=values_DKB[..., _BLOCK // 2 :])
        order_B = _nibble_order()
        if order_B is not None and bool((order_B.diff() != 1).any()):
            values_DKB = values_DKB[..., order_B]
        scale_G1E, zero_G1E = self._scale_zero_GE2.permute(2, 0, 1).unsqueeze(2).contiguous()
        values_GDE = values_DKB.view(torch.int8).sub_(8).view(num_groups, self._group, out_features)
        return torch.addcmul(zero_G1E, values_GDE.to(scale_G1E.dtype), scale_G1E).flatten(0, 1)


@cache
def _nibble_order() -> torch.Tensor | None:
    """Where in a block of 64 packed output features each of them lies, low halves first; None: in no such way.

    It depends on the processor, so it is read off a packed block whose values are the features' own numbers.
    """
    if not hasattr(torch, "_convert_weight_to_int4pack_for_cpu"):
        return None
    feature_E1 = torch.arange(_BLOCK, dtype=torch.int32).unsqueeze(1).expand(_BLOCK, 64)
    halves = []
    for part in (feature_E1 % 16, feature_E1 // 16):
        packed = torch._convert_weight_to_int4pack_for_cpu(part.contiguous(), _INNER_K_TILES)
        octets = packed.view(torch.uint8).view(64, _BLOCK // 2)
        halves.append(torch.cat((octets & 15, octets >> 4), dim=-1).int())
    found = halves[0] + 16 * halves[1]
    if not torch.equal(found, found[:1].expand_as(found)) or not torch.equal(found[0].sort().values, feature_E1[:, 0]):
        return None
    return found[0].argsort()


_onednn: Any = torch.ops.onednn


def _multiply_int8(
    x_TD: torch.Tensor, packed: torch.Tensor, scale_E: torch.Tensor, no_zero_E: torch.Tensor, *, factor: float = 1.0
) -> torch.Tensor:
    """float32 [T, E] of int8 [T, D] and packed int8 weights, times `factor`."""
    y: torch.Tensor = _onednn.qlinear_pointwise(
        x_TD, factor, 0, packed, scale_E, no_zero_E, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def _add_int8(
    sum_TE: torch.Tensor, x_TD: torch.Tensor, packed: torch.Tensor, scale_E: torch.Tensor, no_zero_E: torch.Tensor
) -> torch.Tensor:
    """The same product added to `sum_TE`, in its memory."""
    given = x_TD, 1.0, 0, packed, scale_E, no_zero_E, sum_TE, None, 1.0, 0, torch.float32, 1.0, 0
    y: torch.Tensor = _onednn.qlinear_pointwise.binary(*given, "sum", 1.0, "none", [], "")
    return y
