"""Products with quantised matrices against the dequantised matrix in float64, and what they are chosen for."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.quantized import cpu
from models.quantized.matrix import QuantizedMatrix, pack_nibbles, unpack_nibbles
from models.quantized.product import DequantizedProduct, Product, choose_product
from models.quantized.scheme import Scheme

CPU = torch.device("cpu")
SCHEMES = {
    "int8": Scheme("int8"),
    "int4 in groups of 128": Scheme("int4", 128, has_zero=True),
    "int4 in groups of 32": Scheme("int4", 32, has_zero=True),
}
FALL_BACK = {"fp8": Scheme("fp8"), "fp8 in groups": Scheme("fp8", 64), "int8 in groups": Scheme("int8", 64)}
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 2**-7}
"""Of the greatest result. int8 takes activations to 15 bits of a row's greatest: half a unit of 2^-14 for each of 256
random terms, four deviations. In bfloat16 the result's own rounding, and that of int4's zero points or of a matrix
that is dequantised for good, is more."""


def matrix_of(
    scheme: Scheme, dtype: torch.dtype, *, out_features: int = 192, in_features: int = 256
) -> QuantizedMatrix:
    matrix = QuantizedMatrix(out_features, in_features, scheme, dtype=dtype, device=CPU)
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(5)) * 0.05
    matrix.quantize(slice(0, 100), weight[:100])
    matrix.quantize(slice(100, out_features), weight[100:])
    return matrix


@cache
def product_of(scheme: Scheme, dtype: torch.dtype, **sizes: int) -> tuple[Product, torch.Tensor]:
    """And the weight that it stands for, in float64."""
    matrix = matrix_of(scheme, dtype, **sizes)
    weight = matrix.dequantize(torch.float64)
    return choose_product(matrix, dtype), weight


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *FALL_BACK.values()], ids=str)
def test_product_is_that_of_the_dequantised_matrix(scheme: Scheme, dtype: torch.dtype) -> None:
    """From one row to more than the int4 kernel is called for."""
    product, weight = product_of(scheme, dtype)
    x = torch.randn(70, 256, generator=torch.Generator().manual_seed(6)).to(dtype)
    bias = torch.randn(192, generator=torch.Generator().manual_seed(7)).to(dtype)
    wanted = x.double() @ weight.t()
    for num_rows in (1, 4, 32, 70):
        found = product(x[:num_rows], None)
        assert found.dtype == dtype
        most = ERRORS[dtype] * wanted.abs().max()
        assert (found.double() - wanted[:num_rows]).abs().max() < most
        with_bias = product(x[:num_rows], bias).double()
        assert (with_bias - wanted[:num_rows] - bias.double()).abs().max() < 2 * most


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(1, 40), seed=st.integers(0, 1000), spread=st.sampled_from([1.0, 100.0]))
def test_rows_have_the_same_bits_in_any_batch_of_int8(num_rows: int, seed: int, spread: float) -> None:
    """In bfloat16 too: sums of whole numbers are exact. Some features are far greater than the rest, as in language
    models; a row of zeros is among them."""
    product, _ = product_of(SCHEMES["int8"], torch.bfloat16)
    assert isinstance(product, cpu.Int8Product)
    x = torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(seed))
    x[:, seed % 256] *= spread
    x[seed % num_rows] = 0
    together = product(x.bfloat16(), None)
    alone = torch.cat([product(row, None) for row in x.bfloat16().split(1)])
    assert torch.equal(together, alone)
    assert not together[seed % num_rows].any()


def test_rows_have_the_same_bits_in_a_batch_whose_halves_are_multiplied_one_by_one() -> None:
    product, _ = product_of(SCHEMES["int8"], torch.float32)
    x = torch.randn(cpu.SPLIT_ROWS + 5, 256, generator=torch.Generator().manual_seed(8))
    assert torch.equal(product(x, None), torch.cat([product(rows, None) for rows in x.split(7)]))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES.values() if scheme.values == "int4"], ids=str)
def test_rows_have_the_same_bits_in_small_batches_of_int4(scheme: Scheme) -> None:
    product, _ = product_of(scheme, torch.bfloat16)
    assert isinstance(product, cpu.Int4Product)
    x = torch.randn(cpu.INT4_ROWS, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(product(x, None), torch.cat([product(row, None) for row in x.split(1)]))


def test_shapes_without_a_kernel_are_dequantised() -> None:
    """torch's int4 kernel wants blocks of 64 output features and groups of 32 to 256."""
    for sizes in ({"out_features": 208}, {"out_features": 192, "in_features": 512}):
        scheme = Scheme("int4", None if "in_features" in sizes else 128, has_zero=True)
        product, weight = product_of(scheme, torch.float32, **sizes)
        assert isinstance(product, DequantizedProduct)
        x = torch.randn(3, weight.shape[1])
        torch.testing.assert_close(product(x, None).double(), x.double() @ weight.t(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("scheme", "most"), [("int8", 1 / 254), ("int4 in groups of 32", 1 / 30)])
def test_quantising_is_off_by_half_a_step_at_most(scheme: str, most: float) -> None:
    """Of the range that shares a scale: twice the greatest, or the greatest less the least; with zero in it.

    A zero point is rounded too, by which int4's ends may lie half a step further off.
    """
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(5)) * 0.05
    matrix = matrix_of(SCHEMES[scheme], torch.float32)
    groups = weight.unflatten(1, (matrix.scale_EG.shape[1], -1))
    span = groups.abs().amax(-1) if scheme == "int8" else groups.amax(-1) - groups.amin(-1)
    error = (matrix.dequantize() - weight).unflatten(1, groups.shape[1:]).abs().amax(-1)
    assert (error <= span * most * (1 if scheme == "int8" else 2) * 1.0001).all()


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *FALL_BACK.values()], ids=str)
def test_rows_can_be_reordered_with_their_scales(scheme: Scheme) -> None:
    matrix, order = matrix_of(scheme, torch.float32), torch.randperm(192, generator=torch.Generator().manual_seed(2))
    wanted = matrix.dequantize()[order]
    matrix.reorder(order)
    assert torch.equal(matrix.dequantize(), wanted)


def test_nibbles_come_back() -> None:
    values = torch.randint(0, 16, (3, 10), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(values)), values)


def test_a_row_of_zeros_is_zero_in_every_form() -> None:
    for scheme in [*SCHEMES.values(), *FALL_BACK.values()]:
        matrix = QuantizedMatrix(1, 256, scheme, dtype=torch.bfloat16, device=CPU)
        matrix.quantize(slice(0, 1), torch.zeros(1, 256))
        assert not matrix.dequantize().any()
