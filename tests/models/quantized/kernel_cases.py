"""Run by `test_kernels.py` under Triton's interpreter: the kernels against the dequantised matrix in float64."""

from __future__ import annotations

import torch

from models.quantized import cuda, triton_product
from models.quantized.matrix import QuantizedMatrix
from models.quantized.product import choose_product
from models.quantized.scheme import Scheme

CPU = torch.device("cpu")
IN_FEATURES = 256
SCHEMES = [
    Scheme("int8"),
    Scheme("int8", 64),
    Scheme("int4", 128, has_zero=True),
    Scheme("int4", 32, has_zero=True),
    Scheme("int4", 64),
    Scheme("fp8"),
    Scheme("fp8", 128),
]
ERRORS = {torch.float16: 2**-10, torch.float32: 1e-6}
"""Of the greatest result: its own rounding, or 256 float32 sums."""


def matrix_of(scheme: Scheme, dtype: torch.dtype, out_features: int) -> QuantizedMatrix:
    matrix = QuantizedMatrix(out_features, IN_FEATURES, scheme, dtype=dtype, device=CPU)
    if scheme.values == "int4" and not scheme.has_zero:
        matrix.values.random_(0, 256)
        matrix.scale_EG.uniform_(0.001, 0.01)
    else:
        matrix.quantize(slice(0, out_features), torch.randn(out_features, IN_FEATURES) * 0.05)
    return matrix


def rows_of(num_rows: int, dtype: torch.dtype, group: int) -> torch.Tensor:
    """Multiples of 1/8 that e4m3 has, with the greatest of them in each group: quantised without error.

    (The interpreter rounds to e4m3 wrongly, and does not multiply bfloat16; both are left to the device.) The rows lie
    apart, so that what is beside them would be seen.
    """
    values = (torch.randn(num_rows, IN_FEATURES) * 60).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    values[:, ::group] = 448
    x_TD = torch.full((num_rows, IN_FEATURES + 16), torch.nan, dtype=dtype)[:, :IN_FEATURES]
    return x_TD.copy_(values / 8)


def check_product(scheme: Scheme, dtype: torch.dtype, num_rows: int, out_features: int) -> None:
    matrix = matrix_of(scheme, dtype, out_features)
    weight_ED, kernel = matrix.dequantize(torch.float64), triton_product.KernelMatrix(matrix)
    x_TD = rows_of(num_rows, dtype, kernel.group)
    bias_E = torch.randn(out_features).to(dtype)
    given_TD, scale_TG = x_TD, None
    if scheme.values == "fp8":
        given_TD, scale_TG = triton_product.quantize_rows(x_TD, kernel.group)
        assert torch.equal(given_TD.float(), x_TD.float() * 8) and (scale_TG == 1 / 8).all()
    found = triton_product.multiply(given_TD, kernel, bias_E, dtype=dtype, scale_TG=scale_TG)
    wanted = x_TD.double() @ weight_ED.t() + bias_E.double()
    error = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
    assert found.dtype == dtype and error < ERRORS[dtype], (scheme, dtype, num_rows, error)


def check_dequantized(scheme: Scheme) -> None:
    matrix = matrix_of(scheme, torch.float16, 5)
    weight_ED = matrix.dequantize()
    assert torch.equal(triton_product.dequantize(triton_product.KernelMatrix(matrix), torch.float32), weight_ED), scheme


def check_choice() -> None:
    """What `choose_product` gives on CUDA, computed here: every class, few rows and, where it is another way, many."""
    chosen: dict[Scheme, tuple[type, torch.dtype]] = {
        Scheme("int8"): (cuda.WeightOnlyProduct, torch.float16),
        Scheme("int4", 128, has_zero=True): (cuda.WeightOnlyProduct, torch.float16),
        Scheme("fp8", 128): (cuda.GroupScaledProduct, torch.float16),
    }
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (
        2,
        13,
    ):  # before, on CPU, with one scale for the tensor only
        chosen[Scheme("fp8")] = (cuda.RowScaledProduct, torch.bfloat16)
    for scheme, (kind, dtype) in chosen.items():
        matrix = matrix_of(scheme, dtype, 48)
        weight_ED, product = matrix.dequantize(torch.float64), choose_product(matrix, dtype)
        assert type(product) is kind, (scheme, product)
        for num_rows in (1, triton_product.DENSE_ROWS + 1) if kind is cuda.WeightOnlyProduct else (1, 20):
            x_TD, bias_E = rows_of(num_rows, dtype, scheme.group or IN_FEATURES), torch.randn(48).to(dtype)
            found, wanted = product(x_TD, bias_E).double(), x_TD.double() @ weight_ED.t() + bias_E.double()
            error = ((found - wanted).norm() / wanted.norm()).item()
            assert error < torch.finfo(dtype).eps, (scheme, num_rows, error)
    print("every product within bounds")


torch.manual_seed(0)
for scheme in SCHEMES:
    check_dequantized(scheme)
    check_product(scheme, torch.float32, 1, 64)
    check_product(scheme, torch.float16, 19, 72)
check_product(Scheme("int8"), torch.float16, 130, 136)
print(f"{2 * len(SCHEMES) + 1} products within bounds")
check_choice()
