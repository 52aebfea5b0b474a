"""Layers compute what torch computes, and a row's result does not depend on the number of rows beside it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models.layers import MIN_ROWS, GatedLinear, Linear, RMSNorm, can_pack

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def linear(in_features: int, out_features: int, dtype: torch.dtype, random: torch.Generator) -> Linear:
    layer = Linear(in_features, [("a", out_features)], has_bias=True, dtype=dtype, device=CPU)
    for parameter in layer.parameters().values():
        parameter.copy_(torch.randn(parameter.shape, generator=random))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 96), (256, 768), (320, 1024)])
def test_linear_equals_torch_packed_or_not(
    in_features: int, out_features: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    layer = linear(in_features, out_features, dtype, random)
    x = torch.randn(7, in_features, generator=random).to(dtype)
    expected = F.linear(x, layer.weight_ED, layer.bias_E)
    layer.finish()
    # float32: sums of up to 320 products of size one in another order; bfloat16: one unit of its eight bits.
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-1, "rtol": 8e-3}
    torch.testing.assert_close(layer(x), expected, **tolerance)


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 128), (192, 576), (256, 768), (64, 2048), (512, 1024)])
def test_float32_row_does_not_depend_on_the_number_of_rows(
    in_features: int, out_features: int, random: torch.Generator
) -> None:
    if not can_pack(torch.empty(64, 64)):
        pytest.skip("this torch has no oneDNN: products in float32 round as the number of rows has it")
    layer = linear(in_features, out_features, torch.float32, random)
    layer.finish()
    x = torch.randn(130, in_features, generator=random)
    everything = layer(x)
    for num_rows in (*range(MIN_ROWS, 20), 31, 32, 33, 64, 100, 128):
        assert torch.equal(layer(x[:num_rows]), everything[:num_rows]), num_rows


@pytest.mark.parametrize("shape", [(64,), (6, 16)])
def test_norm_equals_torch_and_does_not_depend_on_the_number_of_rows(
    shape: tuple[int, ...], random: torch.Generator
) -> None:
    norm = RMSNorm(shape, 1e-5, dtype=torch.float32, device=CPU)
    norm.weight.copy_(torch.randn(shape, generator=random))
    norm.finish()
    x = torch.randn(70, *shape, generator=random)
    out = norm(x)
    torch.testing.assert_close(out, F.rms_norm(x, shape[-1:], eps=1e-5) * norm.weight, atol=1e-6, rtol=1e-6)
    for num_rows in (1, 2, 5, 16, 33):
        assert torch.equal(norm(x[:num_rows]), out[:num_rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_packed", [False, True])
def test_gated_linear_is_silu_of_the_gate_times_up(
    dtype: torch.dtype, is_packed: bool, random: torch.Generator
) -> None:
    layer = GatedLinear(64, ("gate", 96), ("up", 96), has_bias=True, dtype=dtype, device=CPU)
    weights = {name: torch.randn(part.shape, generator=random).to(dtype) for name, part in layer.parameters().items()}
    for name, part in layer.parameters().items():
        part.copy_(weights[name])
    if is_packed:
        layer.finish()
    x = torch.randn(70, 64, generator=random).to(dtype)
    wide = {name: weight.double() for name, weight in weights.items()}
    gate, up = (F.linear(x.double(), wide[f"{name}.weight"], wide[f"{name}.bias"]) for name in ("gate", "up"))
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.03}
    torch.testing.assert_close(layer(x).double(), F.silu(gate) * up, **tolerance)
    if dtype == torch.float32 and is_packed:
        for num_rows in (MIN_ROWS, 7, 16, 33):
            assert torch.equal(layer(x[:num_rows]), layer(x)[:num_rows])


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_norm_after_a_product_is_that_of_the_sum_with_the_residual(is_packed: bool, random: torch.Generator) -> None:
    layer = linear(64, 96, torch.float32, random)
    if is_packed:
        layer.finish()
    norm = RMSNorm((96,), 1e-5, dtype=torch.float32, device=CPU)
    norm.weight.copy_(torch.randn(96, generator=random))
    norm.finish()
    x, residual = torch.randn(70, 64, generator=random), torch.randn(70, 96, generator=random)
    expected = residual + layer(x)
    total, normed = norm.after(*layer.add_to(residual.clone(), x))
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(normed, norm(total))
    for num_rows in (MIN_ROWS, 7, 16, 33):
        if is_packed:
            some, _ = norm.after(*layer.add_to(residual[:num_rows].clone(), x[:num_rows]))
            assert torch.equal(some, total[:num_rows])
