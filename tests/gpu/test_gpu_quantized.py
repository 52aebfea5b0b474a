"""On a CUDA device: quantised products against the dequantised matrix in float64, and tokens of quantised models."""

from __future__ import annotations

import pytest
import torch

from loadtest.gpu import correct
from models.quantized import cuda, product
from models.quantized.matrix import QuantizedMatrix
from models.quantized.scheme import ON_LOAD, Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: quantised products on real tensor cores remain unchecked"
    ),
]
CUDA = torch.device("cuda")
PRODUCTS = {
    Scheme("int8"): cuda.WeightOnlyProduct,
    Scheme("int4", 128, has_zero=True): cuda.WeightOnlyProduct,
    Scheme("int4", 32, has_zero=True): cuda.WeightOnlyProduct,
    Scheme("fp8"): cuda.RowScaledProduct,
    Scheme("fp8", 128): cuda.GroupScaledProduct,
}


def skip_without_fp8(values: str) -> None:
    if values == "fp8" and torch.cuda.get_device_capability() < product.FP8_CAPABILITY:
        pytest.skip("this device multiplies no e4m3 numbers: fp8 products remain unchecked")


@pytest.mark.parametrize("num_rows", [1, 16, 100, 300])
@pytest.mark.parametrize(("scheme", "kind"), PRODUCTS.items(), ids=str)
def test_products_are_those_of_the_dequantised_matrix(scheme: Scheme, kind: type, num_rows: int) -> None:
    """Weights only: bfloat16's rounding. e4m3: activations are rounded to three bits, 3 % of a random row."""
    skip_without_fp8(scheme.values)
    matrix = QuantizedMatrix(1536, 4096, scheme, dtype=torch.bfloat16, device=CUDA)
    matrix.quantize(slice(0, 1536), torch.randn(1536, 4096, device=CUDA) * 0.02)
    weight_ED, computed = matrix.dequantize(torch.float64), product.choose_product(matrix, torch.bfloat16)
    assert type(computed) is kind
    x_TD = torch.randn(num_rows, 4096, device=CUDA).bfloat16()
    bias_E = torch.randn(1536, device=CUDA).bfloat16()
    wanted = x_TD.double() @ weight_ED.t() + bias_E.double()
    error = (computed(x_TD, bias_E).double() - wanted).norm() / wanted.norm()
    assert error < (0.04 if scheme.values == "fp8" else 2**-8)


@pytest.mark.parametrize("quantization", ON_LOAD)
def test_a_quantised_model_gives_tokens_with_graphs_and_without(tmp_path, quantization: str) -> None:
    skip_without_fp8(quantization)
    folder = correct.write_checkpoint(tmp_path, correct.FAMILIES[0])
    values = {"quantization": quantization, "dtype": "bfloat16"}
    tokens = correct.generate(folder, "cuda", correct.PROMPTS, **values)
    assert all(tokens)
    assert correct.generate(folder, "cuda", correct.PROMPTS, enforce_eager=True, **values) == tokens
