"""A layer's matrix in a quantised form, behind the interface of `models/layers.py`'s `Linear`.

What `parameters` gives is not memory but places: each quantises or unpacks what it is given into its rows at once, so
that loading holds one tensor of a checkpoint beside the quantised model.

Legend: T tokens, D input features, E output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.layers import silu_mul_of
from models.quantized.formats import Format, Stored
from models.quantized.matrix import QuantizedMatrix
from models.quantized.product import Product, choose_product, keeps_quantized
from models.quantized.scheme import Scheme
from models.text.base import ModelError
from models.weights import Cut, Storage


class Slot:
    """Where one tensor of a checkpoint goes. Shaped as the checkpoint has it, of a shard only its part."""

    __slots__ = ("_name", "_stored", "device", "nbytes", "shape")

    def __init__(self, name: str, stored: Stored, num_bytes: int, device: torch.device):
        self._name, self._stored, self.device = name, stored, device
        self.shape, self.nbytes = torch.Size(stored.shape), num_bytes

    def numel(self) -> int:
        """Weights of the model, not numbers of the checkpoint."""
        return self._stored.num_weights

    def copy_(self, tensor: torch.Tensor) -> None:
        self._stored.take(self._name, tensor)


class QuantizedLinear:
    """`x @ weight.T + bias`, one matrix for what may be several in the checkpoint."""

    __slots__ = ("_bias_E", "_dtype", "_format", "_matrix", "_product", "_rows")

    def __init__(
        self,
        in_features: int,
        parts: Sequence[tuple[str, int]],
        scheme: Scheme,
        format: Format,
        *,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """`parts` as for `Linear`; `dtype`: of activations and bias."""
        out_features = sum(size for _, size in parts)
        self._matrix: QuantizedMatrix | None = QuantizedMatrix(
            out_features, in_features, scheme, dtype=dtype, device=device
        )
        self._bias_E = torch.empty(out_features, dtype=dtype, device=device) if has_bias else None
        self._format, self._dtype = format, dtype
        self._rows: dict[str, slice] = {}
        start = 0
        for prefix, size in parts:
            self._rows[prefix] = slice(start, start + size)
            start += size
        self._product: Product | None = None

    @property
    def matrix(self) -> QuantizedMatrix:
        """Before `finish` only."""
        assert self._matrix is not None
        return self._matrix

    @property
    def nbytes(self) -> int:
        """Held for the matrix; after `finish`."""
        assert self._product is not None
        return self._product.nbytes

    def parameters(self) -> dict[str, Storage]:
        named: dict[str, Storage] = {}
        is_kept = keeps_quantized(self.matrix, self._dtype)
        for prefix, rows in self._rows.items():
            for stored in self._format.tensors(self.matrix, rows):
                name = f"{prefix}.{stored.suffix}"
                num_bytes = stored.num_bytes if is_kept else stored.num_weights * self._dtype.itemsize
                named[name] = Slot(name, stored, num_bytes, self.matrix.values.device)
            if self._bias_E is not None:
                named[f"{prefix}.bias"] = self._bias_E[rows]
        return named

    def cuts(self, prefix: str, dim: int, start: int) -> dict[str, Cut]:
        """Of the tensors of a part that is a shard, from output (dim 0) or input feature `start` on.

        Raises ModelError where the shard begins or ends within what shares a scale or a number.
        """
        rows, cuts = self._rows[prefix], {}
        size = self.matrix.in_features if dim else rows.stop - rows.start
        for stored in self._format.tensors(self.matrix, rows):
            unit = stored.units[dim]
            if unit is None:
                continue
            if start % unit or size % unit:
                raise ModelError(
                    f"tensor_parallel_size cuts {prefix} at its {('output', 'input')[dim]} features {start} and "
                    f"{start + size}, but {stored.suffix} of the quantised checkpoint stands for {unit} of them at a "
                    f"time; choose a size that cuts it at multiples of {unit}"
                )
            cuts[f"{prefix}.{stored.suffix}"] = Cut(dim, start // unit)
        if dim == 0:
            cuts[f"{prefix}.bias"] = Cut(0, start)
        return cuts

    def reorder(self, order_E: torch.Tensor) -> None:
        """Put output feature `order_E[i]` at i. Between filling and `finish`."""
        self.matrix.reorder(order_E)
        if self._bias_E is not None:
            self._bias_E = self._bias_E[order_E]

    def finish(self) -> None:
        """Give the matrix to the product that its device has for it."""
        self._product = choose_product(self.matrix, self._dtype)
        self._matrix = None

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        assert self._product is not None, "finish has not run"
        return self._product(x_TD, self._bias_E)

    def add_to(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return residual_TE, self(x_TD)


class QuantizedGated:
    """silu(gate(x)) * up(x) with both in one quantised matrix."""

    __slots__ = ("_merged", "_silu_mul")

    def __init__(self, merged: QuantizedLinear, device: torch.device):
        self._merged, self._silu_mul = merged, silu_mul_of(device)

    def parameters(self) -> dict[str, Storage]:
        return self._merged.parameters()

    def cuts(self, prefix: str, dim: int, start: int) -> dict[str, Cut]:
        return self._merged.cuts(prefix, dim, start)

    def finish(self) -> None:
        self._merged.finish()

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self._silu_mul(self._merged(x_TD))
