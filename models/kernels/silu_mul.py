"""silu(gate) * up, of the two halves of one matrix product, in one kernel.

Error against float64 from the same inputs, of an output y rounded to p bits: at most (2^-p + 2^-16) |y|, and 2^-115
|up| where silu itself is that small. 2^-p is the one rounding at the end; the rest is float32, of which most is the
exponential of a gate near -88: its argument times log2(e) is rounded to 2^-24 of itself.

Legend: T rows, E features of the gate and of the other half.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LANES = 1024
"""Features of a program: eight of each half per thread, loaded as 16 bytes in half precision."""


def silu_mul(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [T, E] of rows with the gate's E features first and the others behind them (F = 2 E).

    Rows are dense and may lie apart. Computed in float32, rounded once.
    """
    num_rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    assert gate_up_TF.stride(1) == 1, "the rows of a product are dense"
    out_TE = torch.empty(num_rows, width, dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    if num_rows > 0:
        grid = (num_rows, triton.cdiv(width, _LANES))
        _silu_mul[grid](gate_up_TF, out_TE, gate_up_TF.stride(0), width=width, lanes=_LANES)
    return out_TE


def silu_mul_reference(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, in the input's own precision."""
    gate_TE, up_TE = gate_up_TF.chunk(2, dim=-1)
    return gate_TE * torch.sigmoid(gate_TE) * up_TE


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, stride, width: tl.constexpr, lanes: tl.constexpr):
    """Some features of one row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * lanes + tl.arange(0, lanes)
    is_lane = lane < width
    at = gate_up_ptr + row * stride + lane
    gate = tl.load(at, mask=is_lane, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=is_lane, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + lane, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=is_lane)
