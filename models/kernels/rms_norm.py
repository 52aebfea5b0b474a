"""RMSNorm in one kernel, with the sum of the residual stream before it where there is one.

Without fusing, a residual is read and written by an addition and read again by the norm: three passes and two launches.
Here a program takes a row (or some short ones, such as heads) into registers and is done with it.

Error against float64 from the same inputs, of an output y rounded to p bits: at most (2^-p + 2^-19) |y|, and half the
least subnormal. 2^-p is the one rounding at the end; the rest is float32: up to 41 additions of squares in a row (a
thread's own and the tree over threads, halved by the root), the approximate `rsqrt` of 2^-22 and two products. A
residual is the correctly rounded sum, and the norm is of that sum: both as without fusing.

Legend: T rows, D features.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of kernels are pointers and numbers of a compiler, not Python values)

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 1024
"""Least of a program: with fewer a device is busy starting programs."""


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, rounded once."""
    return _launch(x, None, weight_D, eps)


def add_rms_norm_(residual: torch.Tensor, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of `residual + x`; the sum is left in `residual`, whose rows must be dense."""
    return _launch(x, residual, weight_D, eps)


def rms_norm_reference(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in plain torch, in the inputs' own precision."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    width = x.shape[-1]
    x_TD = x.reshape(-1, width)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # A view, or the sum would be lost in a copy.
    residual_TD = x_TD if residual is None else residual.view(-1, width)
    assert residual_TD.stride(1) == 1, "the rows of a residual are dense"
    num_rows = x_TD.shape[0]
    if num_rows > 0:
        lanes = triton.next_power_of_2(width)
        rows = max(_ELEMENTS // lanes, 1)
        _rms_norm[(triton.cdiv(num_rows, rows),)](
            x_TD, residual_TD, weight_D, out, num_rows, x_TD.stride(0), residual_TD.stride(0), eps,
            width=width, rows=rows, lanes=lanes, has_residual=residual is not None,
            num_warps=min(max(rows * lanes // 512, 1), 16),
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    width: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    has_residual: tl.constexpr,
):
    """Some rows."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    lane = tl.arange(0, lanes)[None, :]
    is_there = (row < num_rows) & (lane < width)
    x = tl.load(x_ptr + row * x_stride + lane, mask=is_there, other=0.0).to(tl.float32)
    if has_residual:
        at = residual_ptr + row * residual_stride + lane
        total = (x + tl.load(at, mask=is_there, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(at, total, mask=is_there)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    weight = tl.load(weight_ptr + lane, mask=lane < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + lane, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=is_there)
