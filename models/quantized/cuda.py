"""Quantised products on CUDA: torch's own where it has one for the scheme, our Triton kernels elsewhere.

Not yet run on a GPU: the kernels are proven under Triton's interpreter and compiled for sm_90, and torch's product of
e4m3 rows is proven on CPU, which has the same function.

Legend: T rows, D input features, E output features, G groups of D.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.quantized import triton_product
from models.quantized.matrix import QuantizedMatrix
from models.quantized.triton_product import DENSE_ROWS, KernelMatrix


class WeightOnlyProduct:
    """int8 and int4 by our kernel, for many rows dequantised first."""

    __slots__ = ("_matrix", "nbytes")

    def __init__(self, matrix: QuantizedMatrix):
        self._matrix = KernelMatrix(matrix)
        self.nbytes = self._matrix.nbytes

    def __call__(self, x_TD: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        if x_TD.shape[0] > DENSE_ROWS:
            return F.linear(x_TD, triton_product.dequantize(self._matrix, x_TD.dtype), bias_E)
        return triton_product.multiply(x_TD, self._matrix, bias_E, dtype=x_TD.dtype)


class RowScaledProduct:
    """e4m3 with a scale for each row of weights and of activations, by `torch._scaled_mm`."""

    __slots__ = ("_scale_1E", "_weight_DE", "nbytes")

    def __init__(self, matrix: QuantizedMatrix):
        self._weight_DE, self._scale_1E = matrix.values.t(), matrix.scale_EG.t()
        self.nbytes = matrix.nbytes

    def __call__(self, x_TD: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        rows_TD, scale_T1 = triton_product.quantize_rows(x_TD, x_TD.shape[1])
        return torch._scaled_mm(
            rows_TD, self._weight_DE, scale_a=scale_T1, scale_b=self._scale_1E, bias=bias_E, out_dtype=x_TD.dtype
        )


class GroupScaledProduct:
    """e4m3 with a scale for each group of both, as block-scaled checkpoints have it, by our kernel."""

    __slots__ = ("_matrix", "nbytes")

    def __init__(self, matrix: QuantizedMatrix):
        self._matrix = KernelMatrix(matrix)
        self.nbytes = self._matrix.nbytes

    def __call__(self, x_TD: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        rows_TD, scale_TG = triton_product.quantize_rows(x_TD, self._matrix.group)
        return triton_product.multiply(rows_TD, self._matrix, bias_E, dtype=x_TD.dtype, scale_TG=scale_TG)
