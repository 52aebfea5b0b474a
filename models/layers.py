"""The layers every decoder is made of, for inference only: plain objects over tensors, few operations each.

They are no `nn.Module`s: a small model's step is dominated by the cost of a call, and attribute look-up through
`nn.Module.__getattr__` is a good part of it. A layer starts with uninitialised weights; `parameters` names the slices
of its storage by the checkpoint's tensor names, `weights.py` fills them, and `finish` is called once afterwards.

Legend: T tokens, D input features, E output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from models.kernels.available import has_kernels
from models.parallel import Place
from models.weights import Cut, Storage

MIN_ROWS = 4
"""On CPU a product with fewer rows is padded to this many: packed float32 rounds a lone row differently at some shapes,
and oneDNN's bfloat16 kernels are 20 to 30 % faster at 4 rows than at 1 or 2 (4096 x 1024, one thread, AMD EPYC: 406
against 500 and 600 us)."""


class Linear:
    """`x @ weight.T + bias`, one matrix for what may be several in the checkpoint (q, k and v; gate and up)."""

    __slots__ = ("bias_E", "is_packed", "parts", "weight_ED")

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
        self.is_packed = False

    def parameters(self) -> dict[str, torch.Tensor]:
        """Checkpoint name → the view of this layer's storage it fills. Before `finish` only."""
        assert not self.is_packed
        named = {}
        start = 0
        for prefix, size in self.parts:
            named[f"{prefix}.weight"] = self.weight_ED[start : start + size]
            if self.bias_E is not None:
                named[f"{prefix}.bias"] = self.bias_E[start : start + size]
            start += size
        return named

    def cuts(self, prefix: str, dim: int, start: int) -> dict[str, Cut]:
        """Of the tensors of a part that is a shard, from output (dim 0) or input feature (1) `start` on."""
        kinds = ("weight", "bias") if dim == 0 else ("weight",)
        return {f"{prefix}.{kind}": Cut(dim, start) for kind in kinds}

    def reorder(self, order_E: torch.Tensor) -> None:
        """Put output feature `order_E[i]` at i. Between filling and `finish`, and keeping the views of `parameters`."""
        self.weight_ED.copy_(self.weight_ED[order_E])
        if self.bias_E is not None:
            self.bias_E.copy_(self.bias_E[order_E])

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
            self.is_packed = True

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.is_packed:
            return _linear_packed(x_TD, self.weight_ED, self.bias_E, "none", [], "")
        return F.linear(x_TD, self.weight_ED, self.bias_E)

    def add_to(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`residual_TE` and the product, whose sum `RMSNorm.after` makes as it reads them.

        Packed, the sum is part of the product's own last pass, rounded once, and nothing is left to add.
        """
        if self.is_packed:
            return _linear_packed_with(x_TD, residual_TE, self.weight_ED, self.bias_E, "add"), None
        return residual_TE, F.linear(x_TD, self.weight_ED, self.bias_E)


class Matrix(Protocol):
    """What a layer computes with: `Linear`, or a quantised one (`models/quantized`)."""

    def parameters(self) -> Mapping[str, Storage]: ...

    def cuts(self, prefix: str, dim: int, start: int) -> dict[str, Cut]: ...

    def reorder(self, order_E: torch.Tensor) -> None: ...

    def finish(self) -> None: ...

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class SummedLinear:
    """A matrix over a shard of the input features: the shards' products are added, one of them has the bias.

    The sum comes before the residual, so that in bfloat16 the residual is rounded once, as on one rank.
    """

    __slots__ = ("_linear", "_place")

    def __init__(self, linear: Matrix, place: Place):
        self._linear = linear
        self._place = place

    def parameters(self) -> Mapping[str, Storage]:
        return self._linear.parameters()

    def cuts(self, prefix: str, dim: int, start: int) -> dict[str, Cut]:
        return self._linear.cuts(prefix, dim, start)

    def finish(self) -> None:
        self._linear.finish()

    def add_to(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return residual_TE, self._place.sum_(self._linear(x_TD))


class GatedLinear:
    """silu(gate(x)) * up(x), the first half of a Llama feed-forward.

    On CPU two packed products, each with its share of the rest as a last pass over what is still in cache: 6 to 9 %
    less time for the feed-forward of Qwen3 0.6B with 512 or 1024 rows, bfloat16 (two threads, Intel Xeon with AMX).
    Elsewhere one matrix and one product, and one kernel behind it where there are kernels.
    """

    __slots__ = ("_gate", "_merged", "_silu_mul", "_up")

    def __init__(
        self,
        in_features: int,
        gate: tuple[str, int],
        up: tuple[str, int],
        *,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ):
        def linear(*parts: tuple[str, int]) -> Linear:
            return Linear(in_features, parts, has_bias=has_bias, dtype=dtype, device=device)

        self._silu_mul = silu_mul_of(device)
        self._merged = linear(gate, up) if device.type != "cpu" or has_kernels(device) else None
        self._gate, self._up = (linear(gate), linear(up)) if self._merged is None else (self._merged, self._merged)

    def parameters(self) -> dict[str, torch.Tensor]:
        return self._gate.parameters() | self._up.parameters()

    def cuts(self, prefix: str, dim: int, start: int) -> dict[str, Cut]:
        return self._gate.cuts(prefix, dim, start)

    def finish(self) -> None:
        self._gate.finish()
        self._up.finish()

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self._merged is not None:
            return self._silu_mul(self._merged(x_TD))
        if not self._gate.is_packed:
            return F.silu(self._gate(x_TD)).mul_(self._up(x_TD))
        gate_TE = _linear_packed(x_TD, self._gate.weight_ED, self._gate.bias_E, "swish", [], "")
        return _linear_packed_with(x_TD, gate_TE, self._up.weight_ED, self._up.bias_E, "mul")


def silu_mul_of(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function on `device` from rows of gates with as many other features behind them to silu(gate) * other."""
    if not has_kernels(device):
        return _silu_mul
    from models.kernels.silu_mul import silu_mul

    return silu_mul


def _silu_mul(gate_up_TF: torch.Tensor) -> torch.Tensor:
    gate_TE, up_TE = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TE).mul_(up_TE)


def can_pack(weight_ED: torch.Tensor) -> bool:
    """Whether oneDNN computes with a layout of its own for `weight_ED` on this machine."""
    if weight_ED.device.type != "cpu" or has_kernels(weight_ED.device) or not torch.backends.mkldnn.is_available():
        return False
    if weight_ED.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_ED.dtype == torch.float32


class RMSNorm:
    """x / rms(x) over the last dimension times a weight, computed in float32 and rounded once.

    On CPU in five operations where torch's own takes eight. rms(x) is hypot(|x|, sqrt(eps * n)) / sqrt(n), and sqrt(n)
    goes into the weight: 22 against 27 us for four rows of 1024 in bfloat16, 1.0 against 1.2 ms for 1024 (against two
    small operations more and rounding before the weight; two threads, Intel Xeon with AMX). Where there are kernels in
    one, the residual's sum before it included.
    """

    __slots__ = ("_eps", "_kernels", "_sqrt_eps", "_weight", "weight")

    def __init__(self, shape: tuple[int, ...], eps: float, *, dtype: torch.dtype, device: torch.device):
        self.weight = torch.empty(shape, dtype=dtype, device=device)
        self._kernels: Any = None
        if has_kernels(device):
            from models.kernels import rms_norm

            self._kernels = rms_norm
        self._eps = eps
        self._sqrt_eps = torch.tensor((eps * shape[-1]) ** 0.5, device=device)
        self._weight: torch.Tensor | None = None

    def finish(self) -> None:
        """Called once, when `weight` is filled."""
        factor = self.weight.shape[-1] ** 0.5 if self._kernels is None else 1.0
        self._weight = self.weight.float() * factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None and self.weight.dim() == 1:
            return self._kernels.rms_norm(x, self.weight, self._eps)
        return self.in_float32(x).to(x.dtype)

    def after(self, x_TD: torch.Tensor, owed_TD: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_TD` plus what is still owed to it, if anything, and the norm of that. `x_TD` may be changed."""
        if owed_TD is None:
            return x_TD, self(x_TD)
        if self._kernels is not None:
            return x_TD, self._kernels.add_rms_norm_(x_TD, owed_TD, self.weight, self._eps)
        return x_TD.add_(owed_TD), self(x_TD)

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of `x` before it is rounded, in memory of its own."""
        assert self._weight is not None, "finish has not run"
        if self._kernels is not None:
            return F.rms_norm(x.float(), self.weight.shape[-1:], None, self._eps) * self._weight
        x32 = x.float()
        norm = torch.hypot(torch.linalg.vector_norm(x32, dim=-1, keepdim=True), self._sqrt_eps)
        return (x / norm if x32 is x else x32.div_(norm)).mul_(self._weight)


_linear_packed = torch.ops.mkldnn._linear_pointwise.default
_linear_packed_with = torch.ops.mkldnn._linear_pointwise.binary
