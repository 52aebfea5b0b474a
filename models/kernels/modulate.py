"""Adaptive layer norm of diffusion transformers (adaLN-zero; Peebles and Xie, 2023) in one kernel per place.

    gate_add             x + gate * y                           behind attention or feed-forward
    modulate             norm(x) * (1 + scale) + shift          before them; the norm has no weights
    gate_add_modulate    both, where one comes behind the other

gate, scale and shift are one vector for all tokens of a row of the batch, mostly slices of one wide product, so they
may lie apart. Without fusing these are two, four and six passes over all tokens.

Errors against float64 from the same inputs, u = 2^-p for outputs rounded to p bits: a sum x + gate * y is off by at
most u of itself and 2^-23 of |x| + |gate y|; it is then rounded, and the norm is of the rounded sum, as without fusing.
A modulated value is off by at most u of itself and 2^-18 of (|n| + R) |1 + scale| + |shift|, where n is the value's own
norm and R the row's root mean square over its standard deviation: the mean is subtracted before squares are added, so a
row far from zero costs its distance once, not squared. (float32 sums of up to 41 in a row, `rsqrt` of 2^-22.)

Legend: R rows of the batch, T tokens of each, D features.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


def modulate(x_RTD: Tensor, shift_RD: Tensor, scale_RD: Tensor, eps: float) -> Tensor:
    """Computed in float32, rounded once."""
    out_RTD = torch.empty(x_RTD.shape, dtype=x_RTD.dtype, device=x_RTD.device)
    _launch(x_RTD, out=out_RTD, shift_RD=shift_RD, scale_RD=scale_RD, eps=eps)
    return out_RTD


def gate_add(x_RTD: Tensor, gate_RD: Tensor, y_RTD: Tensor) -> Tensor:
    """Computed in float32, rounded once."""
    sum_RTD = torch.empty(x_RTD.shape, dtype=x_RTD.dtype, device=x_RTD.device)
    _launch(x_RTD, total=sum_RTD, gate_RD=gate_RD, y_RTD=y_RTD)
    return sum_RTD


def gate_add_modulate(
    x_RTD: Tensor, gate_RD: Tensor, y_RTD: Tensor, shift_RD: Tensor, scale_RD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, and the sum modulated."""
    sum_RTD, out_RTD = (torch.empty(x_RTD.shape, dtype=x_RTD.dtype, device=x_RTD.device) for _ in range(2))
    _launch(
        x_RTD, total=sum_RTD, gate_RD=gate_RD, y_RTD=y_RTD, out=out_RTD, shift_RD=shift_RD, scale_RD=scale_RD, eps=eps
    )
    return sum_RTD, out_RTD


def modulate_reference(x_RTD: Tensor, shift_RD: Tensor, scale_RD: Tensor, eps: float) -> Tensor:
    """The same in plain torch, in the inputs' own precision."""
    norm_RTD = torch.nn.functional.layer_norm(x_RTD, x_RTD.shape[-1:], eps=eps)
    return norm_RTD * (1 + scale_RD[:, None]) + shift_RD[:, None]


def gate_add_reference(x_RTD: Tensor, gate_RD: Tensor, y_RTD: Tensor) -> Tensor:
    return x_RTD + gate_RD[:, None] * y_RTD


def _launch(
    x_RTD: Tensor,
    *,
    total: Tensor | None = None,
    gate_RD: Tensor | None = None,
    y_RTD: Tensor | None = None,
    out: Tensor | None = None,
    shift_RD: Tensor | None = None,
    scale_RD: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    num_rows, num_tokens, width = x_RTD.shape
    if x_RTD.numel() == 0:
        return
    # What is not there is never read; any tensor stands in its place.
    x_RTD, y_RTD = _dense(x_RTD), _dense(x_RTD if y_RTD is None else y_RTD)
    gate_RD, shift_RD, scale_RD = (
        x_RTD[:, 0] if given is None else _dense(given) for given in (gate_RD, shift_RD, scale_RD)
    )
    assert gate_RD.shape == shift_RD.shape == scale_RD.shape == (num_rows, width)
    lanes = triton.next_power_of_2(width)
    _modulate[(num_tokens, num_rows)](
        x_RTD, y_RTD, gate_RD, shift_RD, scale_RD, x_RTD if total is None else total, x_RTD if out is None else out,
        *x_RTD.stride()[:2], *y_RTD.stride()[:2], gate_RD.stride(0), shift_RD.stride(0), scale_RD.stride(0), eps,
        width=width, lanes=lanes, adds=total is not None, norms=out is not None,
        num_warps=min(max(lanes // 512, 1), 16),
    )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """Features side by side; tokens and rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _modulate(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    total_ptr,
    out_ptr,
    x_row_stride,
    x_stride,
    y_row_stride,
    y_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    width: tl.constexpr,
    lanes: tl.constexpr,
    adds: tl.constexpr,
    norms: tl.constexpr,
):
    """One token of one row. `total` and `out` are dense."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, lanes)
    is_lane = lane < width
    written_at = (row * tl.num_programs(0) + token) * width + lane
    x = tl.load(x_ptr + row * x_row_stride + token * x_stride + lane, mask=is_lane, other=0.0).to(tl.float32)
    if adds:
        y = tl.load(y_ptr + row * y_row_stride + token * y_stride + lane, mask=is_lane, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + lane, mask=is_lane, other=0.0).to(tl.float32)
        total = (x + gate * y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + written_at, total, mask=is_lane)
        x = total.to(tl.float32)
    if norms:
        centred = tl.where(is_lane, x - tl.sum(x, 0) / width, 0.0)
        norm = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        scale = tl.load(scale_ptr + row * scale_stride + lane, mask=is_lane, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row * shift_stride + lane, mask=is_lane, other=0.0).to(tl.float32)
        tl.store(out_ptr + written_at, (norm * (1 + scale) + shift).to(out_ptr.dtype.element_ty), mask=is_lane)
