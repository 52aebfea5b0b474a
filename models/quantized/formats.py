"""The tensors that checkpoints store a quantised matrix in, and how each becomes rows of a `QuantizedMatrix`.

Names, dtypes, shapes and the order of packed values are those of public checkpoints, written by transformers
(`finegrained_fp8`), AutoFP8 and compressed-tensors (0.20, Apache-2.0). Each tensor is converted as it is read, so that
nothing waits for its siblings and nothing but the quantised matrix is held.

Legend: R rows of a part (output features), D input features, G groups of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from models.quantized.matrix import DTYPES, QuantizedMatrix, unpack_nibbles
from models.weight_files import WeightsError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PACKED = 32
"""Bits of a number that packed values lie in, the first in its lowest bits."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint."""

    suffix: str
    """Of its name, behind the matrix's."""
    shape: tuple[int, ...]
    fill: Callable[[torch.Tensor], None]
    units: tuple[int | None, int | None] = (1, 1)
    """Output and input features that one element of each dimension stands for; None: shards all have it whole."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    num_weights: int = 0
    num_bytes: int = 0
    """Held of it, as long as the model is."""

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Fill from the tensor that the checkpoint has by that name. Raises WeightsError when its dtype is another."""
        if tensor.dtype not in self.dtypes:
            stored, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, self.dtypes[0]))
            raise WeightsError(
                f"{name} is stored as {stored}, where quantization_config in config.json means {wanted}; the weights "
                f"do not belong to this config.json"
            )
        with torch.no_grad():
            self.fill(tensor)


class Format(Protocol):
    """How one part of a matrix is stored."""

    def tensors(self, matrix: QuantizedMatrix, rows: slice) -> list[Stored]:
        """Those that fill `rows` of `matrix`."""
        ...


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """Not quantised yet."""

    def tensors(self, matrix: QuantizedMatrix, rows: slice) -> list[Stored]:
        count = rows.stop - rows.start
        return [
            Stored(
                "weight",
                (count, matrix.in_features),
                lambda tensor: matrix.quantize(rows, tensor),
                num_weights=count * matrix.in_features,
                num_bytes=matrix.nbytes * count // matrix.values.shape[0],
            )
        ]


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """A number an element: fp8 or int8 in `weight`, its scales in a tensor beside it.

    `block`: output and input features that share a scale, None for all of them: (None, None) one for the tensor,
    (1, None) one for a row, (1, 128) one for a group, (128, 128) one for a block.
    """

    scale: str
    block: tuple[int | None, int | None]

    def tensors(self, matrix: QuantizedMatrix, rows: slice) -> list[Stored]:
        count, (tall, wide) = rows.stop - rows.start, self.block
        shape = (1,) if tall is None else (-(-count // tall), 1 if wide is None else matrix.in_features // wide)

        def fill_values(tensor: torch.Tensor) -> None:
            matrix.values[rows].copy_(tensor)

        def fill_scale(tensor: torch.Tensor) -> None:
            scale = tensor.float().reshape(shape).reshape(-1, shape[-1])
            scale = scale.expand(count, -1) if tall is None else scale.repeat_interleave(tall, 0)[:count]
            matrix.scale_EG[rows].copy_(scale)

        values = matrix.values[rows]
        return [
            Stored(
                "weight",
                tuple(values.shape),
                fill_values,
                dtypes=(DTYPES[matrix.scheme.values],),
                num_weights=values.numel(),
                num_bytes=values.nbytes,
            ),
            Stored(
                self.scale, shape, fill_scale, self.block, (*FLOATS, torch.float8_e8m0fnu),
                num_bytes=matrix.scale_EG[rows].nbytes,
            ),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """compressed-tensors' `pack-quantized`: values without a sign (2^(bits - 1) is zero), packed along the rows.

    Packed zero points lie the other way: those of the output features of one group follow one another.
    """

    def tensors(self, matrix: QuantizedMatrix, rows: slice) -> list[Stored]:
        count, scheme = rows.stop - rows.start, matrix.scheme
        per_number, num_groups = PACKED // scheme.bits, scheme.num_groups(matrix.in_features)

        def fill_values(tensor: torch.Tensor) -> None:
            octets = tensor.contiguous().view(torch.uint8)[:, : matrix.values.shape[1]]
            # Of int8, 128 more is the same bits with the highest one turned.
            matrix.values[rows].copy_(octets if scheme.bits == 4 else (octets ^ 128).view(torch.int8))

        values_bytes = matrix.values[rows].nbytes
        scale_bytes = matrix.nbytes * count // matrix.values.shape[0] - values_bytes

        def fill_scale(tensor: torch.Tensor) -> None:
            matrix.scale_EG[rows].copy_(tensor)

        def fill_zero(tensor: torch.Tensor) -> None:
            assert matrix.zero_EG is not None
            octets = tensor.t().contiguous().view(torch.uint8)
            matrix.zero_EG[rows].copy_(unpack_nibbles(octets)[:, :count].t())

        stored = [
            Stored(
                "weight_packed",
                (count, -(-matrix.in_features // per_number)),
                fill_values,
                (1, per_number),
                (torch.int32,),
                num_weights=count * matrix.in_features,
                num_bytes=values_bytes,
            ),
            Stored("weight_scale", (count, num_groups), fill_scale, (1, scheme.group), num_bytes=scale_bytes),
        ]
        if scheme.has_zero:
            shape = (-(-count // per_number), num_groups)
            stored.append(Stored("weight_zero_point", shape, fill_zero, (per_number, scheme.group), (torch.int32,)))
        return stored
