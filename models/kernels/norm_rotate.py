"""RMSNorm and rotation by position of queries or keys in one kernel, written where attention reads them.

For transformers that norm every head with the same weights, rotate pairs of neighbours, and attend to text and image
together: instead of norm, some eight operations in float32 and a concatenation, each token is read and written once.

Error against float64 from the same inputs, of outputs rounded to p bits: at most 2^-p of |y| and 2^-18 of |a cos| +
|b sin|, where a and b are the normed pair that is turned (float32 sums of up to 12 in a row, `rsqrt` of 2^-22).

Legend: R rows of the batch, T tokens, N heads, H head dimension.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

_ELEMENTS = 1024
"""Of a program: some heads of one token."""


def norm_rotate_into(
    out_RTNH: Tensor, x_RTNH: Tensor, weight_H: Tensor, eps: float, cos_TH: Tensor, sin_TH: Tensor
) -> None:
    """Fill `out_RTNH` with `x_RTNH`, normed over H and turned: (a, b) becomes (a cos - b sin, b cos + a sin).

    cos and sin are float32, each number twice, for both of its pair. Heads of a token lie side by side; tokens and rows
    may lie apart.
    """
    num_rows, num_tokens, num_heads, head_dim = x_RTNH.shape
    assert x_RTNH.stride()[2:] == out_RTNH.stride()[2:] == (head_dim, 1) and out_RTNH.shape == x_RTNH.shape
    assert cos_TH.is_contiguous() and sin_TH.is_contiguous() and cos_TH.shape == sin_TH.shape == (num_tokens, head_dim)
    if x_RTNH.numel() == 0:
        return
    lanes = triton.next_power_of_2(head_dim)
    heads = min(max(_ELEMENTS // lanes, 1), triton.next_power_of_2(num_heads))
    _norm_rotate[(num_tokens, num_rows, triton.cdiv(num_heads, heads))](
        x_RTNH, out_RTNH, weight_H, cos_TH, sin_TH, *x_RTNH.stride()[:2], *out_RTNH.stride()[:2], eps,
        num_heads=num_heads, head_dim=head_dim, heads=heads, lanes=lanes, num_warps=max(heads * lanes // 512, 1),
    )  # fmt: skip


def norm_rotate_reference(x_RTNH: Tensor, weight_H: Tensor, eps: float, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """The same in plain torch, in the inputs' own precision."""
    normed = x_RTNH * (x_RTNH.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_H
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1)
    return normed * cos_TH[:, None] + torch.stack((-b, a), -1).flatten(-2) * sin_TH[:, None]


@triton.jit
def _norm_rotate(
    x_ptr,
    out_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    x_row_stride,
    x_stride,
    out_row_stride,
    out_stride,
    eps,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    heads: tl.constexpr,
    lanes: tl.constexpr,
):
    """Some heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * heads + tl.arange(0, heads)[:, None]
    lane = tl.arange(0, lanes)[None, :]
    is_there = (head < num_heads) & (lane < head_dim)
    place = head * head_dim + lane
    x = tl.load(x_ptr + row * x_row_stride + token * x_stride + place, mask=is_there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + lane, mask=lane < head_dim, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 1) / head_dim + eps)[:, None] * weight
    a, b = tl.split(tl.reshape(normed, [heads, lanes // 2, 2]))
    turned = tl.reshape(tl.join(-b, a), [heads, lanes])
    cos = tl.load(cos_ptr + token * head_dim + lane, mask=lane < head_dim, other=0.0)
    sin = tl.load(sin_ptr + token * head_dim + lane, mask=lane < head_dim, other=0.0)
    y = (normed * cos + turned * sin).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row_stride + token * out_stride + place, y, mask=is_there)
