"""The layers every decoder is made of, for inference only: plain objects over tensors, few operations each.

They are no `nn.Module`s: a small model's step is dominated by the cost of a call, and attribute look-up through
`nn.Module.__getattr__` is a good part of it. A layer starts with uninitialised weights; `parts` names the slices of
its fused weight by the checkpoint's tensor names, `weights.py` fills them, and `finish` is called once afterwards.

Legend: T tokens, D input features, E output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


class Linear:
    """`x @ weight.T + bias`, one matrix for what may be several in the checkpoint (q, k and v; gate and up)."""

    __slots__ = ("bias_E", "parts", "weight_ED")

    def __init__(
        self,
        in_features: int,
        parts: Sequence[tuple[str, int]],
        *,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """`parts`: checkpoint prefix and output features of each matrix, in the order of their rows."""
        out_features = sum(size for _, size in parts)
        self.weight_ED = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias_E = torch.empty(out_features, dtype=dtype, device=device) if has_bias else None
        self.parts = tuple(parts)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Checkpoint name → the view of this layer's storage it fills."""
        named = {}
        start = 0
        for prefix, size in self.parts:
            named[f"{prefix}.weight"] = self.weight_ED[start : start + size]
            if self.bias_E is not None:
                named[f"{prefix}.bias"] = self.bias_E[start : start + size]
            start += size
        return named

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TD, self.weight_ED, self.bias_E)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) over the last dimension, in float32, rounded to x's dtype before the weight (as Llama does)."""
    x32 = x.float()
    scale = torch.linalg.vecdot(x32, x32).mul_(1 / x.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)
    return (x32 * scale).to(x.dtype) * weight


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where the last dimension holds gate, then up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
