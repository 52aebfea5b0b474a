"""Attention over a paged KV cache, behind one protocol: `plan` once per step on the host, `attend` once per layer.

All tokens of a step lie flat, sequence after sequence, whatever their phase: a decode is a sequence with one new token,
a prefill chunk one with many. `sdpa.py` is the reference of every other backend.

Legend: T new tokens of the step, S sequences, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch

from models.staging import Staging

SCALE_BYTES = 4
"""Of the float32 scale that goes with each quantised key and value, by position and head."""


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What the cache of one model looks like, and attention over it. `block_size` positions a block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    """That the model computes in."""
    device: torch.device
    kv_dtype: str = "auto"
    """What keys and values are kept in: "auto" (`dtype`), "fp8_e4m3" or "int8" (see `quantized_kv.py`)."""
    caps_scores: bool = False
    """Some layers squeeze their scores (`softcap`), which not every backend can."""

    @property
    def is_quantized(self) -> bool:
        return self.kv_dtype != "auto"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values, with the scales of quantised ones."""
        row_bytes = self.head_dim + SCALE_BYTES if self.is_quantized else self.head_dim * self.dtype.itemsize
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * row_bytes


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Which positions of which sequences a step computes. Plain integers; one entry per sequence.

        | cached in blocks (num_computed) | new (num_new) |
        0                                 ^ first new     ^ length = num_computed + num_new

    `block_tables[s]` holds at least ceil(length / block_size) block ids.
    """

    num_new: Sequence[int]
    num_computed: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    behind: torch.Tensor | None = None
    """int32 [sequences] on the device: by how many positions each really starts before `num_computed`, where the host
    does not know how many drafts of the step before were accepted. Positions, slots and lengths are less by so many.
    None: by none."""

    def exact(self) -> TokenLayout:
        """With `behind` taken off. It reads the device, which costs nothing where that is the host."""
        if self.behind is None:
            return self
        starts = [start - behind for start, behind in zip(self.num_computed, self.behind.tolist(), strict=True)]
        return TokenLayout(self.num_new, starts, self.block_tables)

    def slots(self, block_size: int) -> list[int]:
        """Where the new positions go, in order: block id * `block_size` + place in the block."""
        return [
            table[position // block_size] * block_size + position % block_size
            for num_new, start, table in zip(self.num_new, self.num_computed, self.block_tables, strict=True)
            for position in range(start, start + num_new)
        ]

    def flat_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """All block tables one after the other, and where each begins; both int32. No padding, so that the place of
        a block depends on nothing but this array, whatever the longest table is.

        Tables that are `array("i")` are joined as they lie (256 of 100 blocks: 45 µs; as lists 760 µs).
        """
        tables = [table if isinstance(table, array) else array("i", table) for table in self.block_tables]
        starts = np.zeros(len(tables), np.int32)
        np.cumsum([len(table) for table in tables[:-1]], out=starts[1:])
        return np.frombuffer(bytearray().join(tables), np.int32), starts


class AttentionBackend(Protocol):
    """One way to keep and read keys and values. An instance belongs to one runner and one cache spec."""

    def allocate(self, num_blocks: int) -> list[Any]:
        """The cache tensors, one entry per layer, in the backend's own layout."""
        ...

    def copy_blocks(self, kv: list[Any], sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Overwrite blocks with others, in every layer: forks of a sequence go on in their own last block."""
        ...

    def plan(self, layout: TokenLayout, staging: Staging) -> Any:
        """Host work of a step: index tensors and whatever the kernels need, the same for all layers.

        What they read from the host is put into `staging`, which the caller sends before the first layer. Parts whose
        size follows from the number of rows and tokens come first, block tables last (`serve/text/cuda_graph.py`).
        """
        ...

    def attend(
        self,
        q_TNH: torch.Tensor,
        new_T2KH: torch.Tensor,
        kv: Any,
        plan: Any,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values into `kv` (this layer's cache), then attend causally; returns out_TNH.

        `new_T2KH` holds a token's keys, then its values; heads are contiguous, tokens and halves need not be.

        `window`: a position sees itself and the `window - 1` before it (sliding window); None: all before it.
        `softcap`: scores are squeezed to `softcap * tanh(score / softcap)` before the mask (Gemma 2).
        """
        ...


class RotatingBackend(AttentionBackend, Protocol):
    """One that can also do in a single kernel what comes between projection and attention: norm, rotation, writing."""

    def rotate_and_store(
        self,
        qkv_TMH: torch.Tensor,
        cis_T1C: torch.Tensor,
        norm: tuple[torch.Tensor, float] | None,
        kv: Any,
        plan: Any,
    ) -> None:
        """Norm (where there is one) and rotate the queries in place, and the keys on their way to the cache.

        M: query, key and value heads, side by side. `norm`: a weight for every query and key head, and epsilon. Pairs
        to rotate lie side by side, C of them (`models/text/rope.py`).
        """
        ...

    def attend_stored(
        self,
        q_TNH: torch.Tensor,
        kv: Any,
        plan: Any,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """`attend` where the new keys and values are in the cache already."""
        ...


def rotates(attention: AttentionBackend) -> TypeGuard[RotatingBackend]:
    return hasattr(attention, "rotate_and_store")
