"""The layers every decoder is made of, for inference only: plain objects over tensors, few operations each.

They are no `nn.Module`s: a small model's step is dominated by the cost of a call, and attribute look-up through
`nn.Module.__getattr__` is a good part of it. A layer starts with uninitialised weights; `parameters` names the slices
of its storage by the checkpoint's tensor names, `weights.py` fills them, and `finish` is called once afterwards.

Legend: T tokens, D input features, E output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

MIN_ROWS = 4
"""On CPU a product with fewer rows is padded to this many: packed float32 rounds a lone row differently at some shapes,
and oneDNN's bfloat16 kernels are 20 to 30 % faster at 4 rows than at 1 or 2 (4096 x 1024, one thread, AMD EPYC: 406
against 500 and 600 us)."""


class Linear:
    """`x @ weight.T + bias`, one matrix for what may be several in the checkpoint (q, k and v; gate and up)."""

    __slots__ = ("_is_packed", "bias_E", "parts", "weight_ED")

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
        self._is_packed = False

    def parameters(self) -> dict[str, torch.Tensor]:
        """Checkpoint name → the view of this layer's storage it fills. Before `finish` only."""
        assert not self._is_packed
        named = {}
        start = 0
        for prefix, size in self.parts:
            named[f"{prefix}.weight"] = self.weight_ED[start : start + size]
            if self.bias_E is not None:
                named[f"{prefix}.bias"] = self.bias_E[start : start + size]
            start += size
        return named

    def finish(self) -> None:
        """On CPU, reorder the weights once into oneDNN's blocked layout and drop the plain ones.

        Two reasons. `F.linear` reorders bfloat16 weights at every call: packed is 1.2 to 2 times faster. And in float32
        a packed product gives a row the same bits among any number of rows (tried from 2 to 600 at ten shapes on an
        Intel Xeon), where MKL's rounding changes with their number: a token does not depend on its batch. Small float32
        matrices pay for that (8192 elements, 32 rows: 23 us packed, 14 plain). In bfloat16 with AMX it does not hold.
        """
        if can_pack(self.weight_ED):
            # The second argument is the number of rows the layout is chosen for; 32 was never slower than 1 or 256.
            self.weight_ED = torch.ops.mkldnn._reorder_linear_weight(self.weight_ED, 32)
            self._is_packed = True

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self._is_packed:
            return _linear_packed(x_TD, self.weight_ED, self.bias_E, "none", [], "")
        return F.linear(x_TD, self.weight_ED, self.bias_E)


def can_pack(weight_ED: torch.Tensor) -> bool:
    """Whether oneDNN computes with a layout of its own for `weight_ED` on this machine."""
    if weight_ED.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight_ED.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_ED.dtype == torch.float32


class RMSNorm:
    """x / rms(x) over the last dimension, in float32, rounded to x's dtype before the weight, as Llama does.

    On CPU in five operations where torch's own takes eight: 10 against 13 us for a row, 330 against 1250 for 512 rows
    of 1024. On CUDA torch's is one kernel, which also multiplies the weight before it rounds.
    """

    __slots__ = ("_eps", "_eps_tensor", "_is_fused", "_share", "weight")

    def __init__(self, shape: tuple[int, ...], eps: float, *, dtype: torch.dtype, device: torch.device):
        self.weight = torch.empty(shape, dtype=dtype, device=device)
        self._eps = eps
        self._eps_tensor = torch.tensor(eps, device=device)
        self._share = 1 / shape[-1]
        self._is_fused = device.type == "cuda"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_fused:
            if self.weight.dim() == 1:
                return F.rms_norm(x, self.weight.shape, self.weight, self._eps)
            return F.rms_norm(x, self.weight.shape[-1:], None, self._eps) * self.weight
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps_tensor, norm, norm, value=self._share).rsqrt_()
        if x32 is x:
            return x * scale * self.weight
        return x32.mul_(scale).to(x.dtype).mul_(self.weight)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where the last dimension holds gate, then up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


_linear_packed = torch.ops.mkldnn._linear_pointwise.default
