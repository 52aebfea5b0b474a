"""Products with quantised matrices of Llama-3.1-8B, as the runtime chooses them, beside a bfloat16 product.

The reference multiplies, in float64, by what the stored numbers stand for. fp8 rounds activations to e4m3 too, which
leaves an error of 3 % that is no fault of the kernel.

Legend: T rows, D input features, E output features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loadtest.gpu.bench import Bench
from loadtest.gpu.kernel import Kernel
from models.quantized.matrix import QuantizedMatrix
from models.quantized.product import choose_product
from models.quantized.scheme import Scheme

SCHEMES = {
    "int4, groups of 128": Scheme("int4", 128, True),
    "int8": Scheme("int8"),
    "fp8": Scheme("fp8"),
    "fp8, groups of 128": Scheme("fp8", 128),
}
MATRICES = (("gate and up", 28_672, 4096), ("down", 4096, 14_336))
ROWS = (1, 64, 256)
_FP8_ERROR = 4e-2
"""Rounding to three bits of mantissa: 2.6 % in norm, which a sum of many keeps."""
_FP8_ERROR_INTERPRETED = 0.125
"""Triton's interpreter cuts instead of rounding."""


def products(bench: Bench) -> Iterator[Kernel]:
    dtype = torch.float32 if bench.is_rehearsal else torch.bfloat16
    fp8_error = _FP8_ERROR_INTERPRETED if bench.is_rehearsal else _FP8_ERROR
    matrices, all_rows = ((("tiny", 64, 128),), (3,)) if bench.is_rehearsal else (MATRICES, ROWS)
    for name, out_features, in_features in matrices:
        weight_ED = torch.randn(out_features, in_features, device=bench.device, dtype=dtype)
        for label, scheme in SCHEMES.items():
            matrix = QuantizedMatrix(out_features, in_features, scheme, dtype=dtype, device=bench.device)
            matrix.quantize(slice(0, out_features), weight_ED)
            exact_ED = matrix.dequantize(torch.float64)
            product = choose_product(matrix, dtype)
            for rows in all_rows:
                yield Kernel(
                    f"product, {label}",
                    f"{name}, {rows} x {in_features} x {out_features}",
                    lambda rows=rows, d=in_features: (torch.randn(rows, d, device=bench.device, dtype=dtype),),
                    lambda x, product=product: product(x, None),
                    lambda x, exact=exact_ED: x.double() @ exact.T,
                    product.nbytes + rows * (in_features + out_features) * dtype.itemsize,
                    flop=2.0 * rows * in_features * out_features,
                    bound=fp8_error if scheme.values == "fp8" else None,
                    plain=lambda x, weight=weight_ED: torch.nn.functional.linear(x, weight),
                )
            del matrix, exact_ED, product
