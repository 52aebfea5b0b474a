"""Keys and values in one byte: what is stored, and what it stands for. The reference of the kernels.

Every key and value of a position and head has a scale of its own: the largest magnitude in the row over the largest the
format holds. A row is quantised when it is written, from nothing but itself, so the cache of a prefix is the same
whoever computed it, in whatever chunks and batches, before a preemption or after; scales found by calibration, or one
for a block of positions, would give that up or be wrong for some. It costs 4 bytes beside 128. Checkpoints that bring
static scales (`k_scale`, `v_scale`) are served with these all the same.

Error: in fp8 (e4m3, three bits of mantissa) at most 2^-4 of a number, or 2^-10 / 448 of the row's largest for numbers
below 2^-6 / 448 of it; in int8 at most 1/254 of the row's largest. Without their scales the numbers are exact in
bfloat16, so kernels give scales to scores and weights instead.
"""

from __future__ import annotations

import torch

from models.attention.base import SCALE_BYTES

DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0}
_ZERO = 1e-30
"""A row with nothing larger is zero: its scale would be no number of float32."""


def quantize(x: torch.Tensor, kv_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., H] as one byte a number, and their scales [...] in float32. Not finite rows get such a scale."""
    x = x.float()
    largest = x.abs().amax(-1)
    scales = torch.where(largest < _ZERO, 1.0, largest / _LARGEST[kv_dtype])
    x = x / scales[..., None]
    if kv_dtype == "int8":
        x = (x + 0.5).floor().nan_to_num(0.0)
    return x.to(DTYPES[kv_dtype]), scales


def pack(x: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """Rows [..., H] as bytes [..., H + 4]: the numbers, then their scale."""
    values, scales = quantize(x, kv_dtype)
    return torch.cat((values.view(torch.uint8), scales[..., None].view(torch.uint8)), -1)


def unpack(rows: torch.Tensor, kv_dtype: str, dtype: torch.dtype) -> torch.Tensor:
    """What `pack` stored, as numbers again; multiplied in float32 (float64 for float64) and rounded once."""
    values = rows[..., :-SCALE_BYTES].contiguous().view(DTYPES[kv_dtype])
    scales = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(exact) * scales.to(exact)).to(dtype)
