"""The numbers of a quantised matrix, plainly stored: filled by checkpoints or from floats, and dequantised exactly.

This is what every product of `models/quantized` starts from, and its oracle. Nothing here is fast.

Legend: E output features, D input features, G groups of them, R rows given.
"""

from __future__ import annotations

import torch

from models.quantized.scheme import Scheme

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
FP8_MAX, INT8_MAX = 448.0, 127.0


class QuantizedMatrix:
    """Uninitialised until every row of it is filled. int4 values lie two to a byte, the earlier one in its low half."""

    __slots__ = ("in_features", "scale_EG", "scheme", "values", "zero_EG")

    def __init__(
        self, out_features: int, in_features: int, scheme: Scheme, *, dtype: torch.dtype, device: torch.device
    ):
        """`dtype`: of the scales of int4 groups, which is that of the activations; other scales are float32."""
        num_groups = scheme.num_groups(in_features)
        width = in_features if scheme.bits == 8 else in_features // 2
        self.scheme, self.in_features = scheme, in_features
        self.values = torch.empty(out_features, width, dtype=DTYPES[scheme.values], device=device)
        scale_dtype = dtype if scheme.values == "int4" else torch.float32
        self.scale_EG = torch.empty(out_features, num_groups, dtype=scale_dtype, device=device)
        self.zero_EG = torch.empty_like(self.scale_EG) if scheme.has_zero else None

    @property
    def nbytes(self) -> int:
        """As the device holds it: int4 always with zero points."""
        return self.scheme.num_bytes(self.values.shape[0], self.in_features, self.scale_EG.itemsize)

    @torch.no_grad()
    def quantize(self, rows: slice, weight_RD: torch.Tensor) -> None:
        """Fill `rows` with what is nearest to `weight_RD`. Rows, and shards of rows, do not see one another."""
        scheme = self.scheme
        grouped = weight_RD.to(self.values.device, torch.float32).unflatten(1, (self.scale_EG.shape[1], -1))
        if scheme.values == "int4":
            self._quantize_int4(rows, grouped)
            return
        most = FP8_MAX if scheme.values == "fp8" else INT8_MAX
        scale = grouped.abs().amax(-1).div_(most).clamp_(min=torch.finfo(torch.float32).tiny)
        scaled = grouped / scale.unsqueeze(-1)
        scaled = scaled if scheme.values == "fp8" else scaled.round_()
        self.values[rows].copy_(scaled.clamp_(-most, most).flatten(1))
        self.scale_EG[rows].copy_(scale)

    def _quantize_int4(self, rows: slice, grouped: torch.Tensor) -> None:
        """Between the least and the greatest of a group, with zero among the 16 values."""
        assert self.zero_EG is not None, "weights are quantised here with zero points"
        low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
        scale = ((high - low) / 15).clamp_(min=1e-6).to(self.scale_EG.dtype)  # values are chosen for the rounded scale
        zero = (-low / scale.float()).round_().clamp_(0, 15)
        values = (grouped / scale.float().unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(0, 15)
        self.values[rows].copy_(pack_nibbles(values.flatten(1).to(torch.uint8)))
        self.scale_EG[rows].copy_(scale)
        self.zero_EG[rows].copy_(zero)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """weight_ED, computed in float32 and rounded once."""
        values = unpack_nibbles(self.values) if self.scheme.values == "int4" else self.values
        grouped = values.float().unflatten(1, (self.scale_EG.shape[1], -1))
        if self.scheme.values == "int4":
            grouped = grouped - (8.0 if self.zero_EG is None else self.zero_EG.float().unsqueeze(-1))
        return (grouped * self.scale_EG.float().unsqueeze(-1)).flatten(1).to(dtype)

    def reorder(self, order_E: torch.Tensor) -> None:
        """Put row `order_E[i]` at i."""
        # fp8 has no index kernel on every device.
        self.values = self.values.view(torch.uint8)[order_E].view(self.values.dtype)
        self.scale_EG = self.scale_EG[order_E]
        self.zero_EG = None if self.zero_EG is None else self.zero_EG[order_E]


def pack_nibbles(values_RD: torch.Tensor) -> torch.Tensor:
    """uint8 [R, D] below 16 → [R, D / 2], the even features in the low halves."""
    return values_RD[:, 0::2] | (values_RD[:, 1::2] << 4)


def unpack_nibbles(bytes_RC: torch.Tensor) -> torch.Tensor:
    return torch.stack((bytes_RC & 15, bytes_RC >> 4), dim=-1).flatten(1)
