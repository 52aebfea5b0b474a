"""Products with a quantised matrix: what one is, which one a device gets, and the one that needs no kernel.

Chosen once, when the weights are in. Where a device has no kernel for a scheme that a checkpoint came in, the matrix is
dequantised for good: as fast as an unquantised model, and as large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from models.kernels.available import has_kernels
from models.layers import Linear
from models.quantized.matrix import QuantizedMatrix
from models.quantized.scheme import Scheme

FP8_CAPABILITY = (8, 9)
"""CUDA devices from which on multiply e4m3 numbers (Ada, Hopper)."""


class Product(Protocol):
    """x_TD @ weight.T + bias, in the dtype of x. `nbytes`: what it holds."""

    nbytes: int

    def __call__(self, x_TD: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor: ...


def choose_product(matrix: QuantizedMatrix, dtype: torch.dtype) -> Product:
    """What computes with `matrix` on its device, for activations of `dtype`. The matrix itself may be used up."""
    maker = _maker_for(matrix, dtype)
    return DequantizedProduct(matrix, dtype) if maker is None else maker(matrix)


def keeps_quantized(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
    """Whether that product holds the matrix as it is; else as numbers of `dtype`."""
    return matrix.values.device.type == "meta" or _maker_for(matrix, dtype) is not None


def is_computed(scheme: Scheme, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` has a kernel for matrices of usual sizes in `scheme`."""
    return _maker(scheme, 1024, 1024, dtype, device) is not None


def _maker_for(matrix: QuantizedMatrix, dtype: torch.dtype) -> Callable[[QuantizedMatrix], Product] | None:
    return _maker(matrix.scheme, matrix.values.shape[0], matrix.in_features, dtype, matrix.values.device)


def _maker(
    scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> Callable[[QuantizedMatrix], Product] | None:
    group = in_features if scheme.group is None else scheme.group
    if not has_kernels(device):
        return _cpu_maker(scheme, out_features, group, dtype) if device.type == "cpu" else None
    from models.quantized import cuda
    from models.quantized.triton_product import chunk_of

    chunk = chunk_of(scheme.bits, group)
    can_multiply = chunk is not None and in_features % (chunk * 8 // scheme.bits) == 0
    if scheme.values != "fp8":
        return cuda.WeightOnlyProduct if can_multiply else None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return None
    if scheme.group is None and out_features % 16 == 0 and in_features % 16 == 0 and dtype == torch.bfloat16:
        return cuda.RowScaledProduct
    return cuda.GroupScaledProduct if can_multiply else None


def _cpu_maker(
    scheme: Scheme, out_features: int, group: int, dtype: torch.dtype
) -> Callable[[QuantizedMatrix], Product] | None:
    from models.quantized import cpu

    if scheme.values == "int8" and scheme.group is None and cpu.multiplies_int8():
        return cpu.Int8Product
    if scheme.values == "int4" and cpu.multiplies_int4(out_features, group):
        return lambda matrix: cpu.Int4Product(matrix, dtype)
    return None


class DequantizedProduct:
    """The matrix in the dtype of the activations, by the product of an unquantised layer."""

    __slots__ = ("_linear", "nbytes")

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype):
        weight_ED = matrix.dequantize(dtype)
        self._linear = Linear(
            matrix.in_features, [("", weight_ED.shape[0])], has_bias=False, dtype=dtype, device=torch.device("meta")
        )
        self._linear.weight_ED, self.nbytes = weight_ED, weight_ED.nbytes
        self._linear.finish()

    def __call__(self, x_TD: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        y_TE = self._linear(x_TD)
        return y_TE if bias_E is None else y_TE.add_(bias_E)
