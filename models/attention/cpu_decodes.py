"""Decodes on CPU: whose cache begins alike, and how each one's is attended.

In bfloat16, with the extra `cpu`, a compiled loop reads it where it lies (`cpu_paged.py`). Else decodes are batched
into groups (`decode_groups.py`), and torch's kernels compute; the G query heads of a key head are rows of one product.

Decodes that begin with the same blocks (a common prompt) attend those once, all their queries in one product, and each
its own rest; the two parts are joined by their log-sum-exp (as cascade attention, Ye et al., FlashInfer 2024). With 32
sequences of 544 positions, 512 of them common, the common part is read once instead of 32 times.
The joined result is rounded differently in its last bit: in float32 1e-7, in bfloat16 as much as another chunking.

Key lengths of groups are padded to a multiple of 16 or more and masked. With that a decode's bits do not depend on how
far its mates pad it in bfloat16, and in float32 almost never (MKL picks its kernels by size and alignment; then they
differ by 1e-7).

Legend: S decoding sequences, L positions (padded), N query heads, K key/value heads, G = N / K, H head dimension,
R runs (one head's keys or values in one block), B = S * K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.attention.decode_groups import DecodeGroup, DecodeGroups, rows_of, runs_of
from models.attention.dense import attend_dense

if TYPE_CHECKING:
    from models.attention.cpu_paged import PagedDecode, PagedDecodes

ALIGN = 16
"""Key lengths are padded to this many positions, a full vector of float32 (see above)."""
_LEAST_COMMON = 128
"""Positions that decodes must have in common to be attended once: below, two kernel calls cost more than they save."""
_LEAST_MEMBERS = 4
"""Sequences that must share them."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences with one new token each."""

    rows_S: torch.Tensor | slice
    """Their rows among the tokens of the step, in the order of the groups."""
    groups: list[DecodeGroup]
    common_R: torch.Tensor | None = None
    """Of the blocks all begin with, which the groups leave out. None: they have nothing in common."""
    paged: PagedDecodes | None = None
    """What the compiled loop computes instead of groups."""


class Gather:
    """Blocks of the cache as matrices, in one buffer that every call uses again."""

    def __init__(self, spec: KVCacheSpec):
        self._spec = spec
        self._run_values = spec.block_size * spec.head_dim
        self._scratch = torch.empty(0, self._run_values, dtype=spec.dtype)

    def __call__(self, kv: torch.Tensor, runs_R: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num, K, L, H]."""
        if self._scratch.shape[0] < len(runs_R):
            self._scratch = torch.empty(len(runs_R), self._run_values, dtype=self._spec.dtype)
        runs = kv.view(-1, self._run_values)
        gathered = torch.index_select(runs, 0, runs_R, out=self._scratch[: len(runs_R)])
        keys, values = gathered.view(2, num, self._spec.num_kv_heads, -1, self._spec.head_dim)
        return keys, values


class CpuDecodes:
    """Plans and attends the decodes of one model."""

    def __init__(self, spec: KVCacheSpec, num_heads: int, gather: Gather, *, max_bytes: int):
        """`max_bytes`: of copies of the cache that groups may keep, over all layers."""
        self._spec = spec
        self._num_groups = num_heads // spec.num_kv_heads
        self._run_values = spec.block_size * spec.head_dim
        self._blocks_multiple = ALIGN // gcd(ALIGN, spec.block_size)
        self._gather = gather
        self._groups = DecodeGroups(spec, max_bytes)
        # The flash kernel calls a matrix product for every sequence and head; with a few query rows the calls cost more
        # than the work (10.5 against 6.6 ms for 32 sequences of 576 positions, 8 heads of 128, 2 rows a head). For one
        # row, and in float32, it has quicker ways of its own.
        self._multiplies = self._num_groups > 1 and spec.dtype != torch.float32
        self._paged = _compiled(spec)

    def begin_step(self) -> None:
        self._groups.begin_step()

    def plan(
        self,
        alone: list[int],
        lengths: list[int],
        starts: list[int],
        layout: TokenLayout,
        window: int | None,
        *,
        is_plain: bool,
    ) -> list[Decodes]:
        """For the sequences `alone` of the layout, whose rows begin at `starts`. `is_plain`: scores are not capped."""
        found = []
        for members, num_common in self._families(alone, lengths, layout) if is_plain and window is None else ():
            alone = [index for index in alone if index not in members]
            common_R = runs_of(np.array([layout.block_tables[members[0]][:num_common]]), self._spec.num_kv_heads)
            found.append(self._plan(members, lengths, starts, layout, is_plain, common_R, num_common))
        if alone:
            found.append(self._plan(alone, lengths, starts, layout, is_plain, window=window))
        return found

    def attend(
        self,
        q_SNH: torch.Tensor,
        new_SRH: torch.Tensor,
        kv: torch.Tensor,
        decodes: Decodes,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        if decodes.common_R is not None:
            return self._decode_family(q_SNH, new_SRH, kv, decodes, scale)
        if decodes.paged is not None:
            assert self._paged is not None
            return self._paged.attend(q_SNH, kv, decodes.paged, scale)[0].to(self._spec.dtype)
        outs = []
        for group in decodes.groups:
            q_SKGH, keys, values = self._operands(q_SNH[group.rows], new_SRH[group.rows], kv, group)
            if softcap is not None:
                out_SKGH = attend_dense(q_SKGH, keys, values, group.mask_S11L, scale=scale, softcap=softcap)
            elif self._multiplies:
                out_SKGH = _weighted(_scores(q_SKGH, keys, group.mask_S11L, scale).softmax(-1), values)
            else:
                out_SKGH = _flash(q_SKGH, keys, values, 0.0, False, attn_mask=group.mask_S11L, scale=scale)[0]
            outs.append(group.collect(out_SKGH).reshape(-1, *q_SNH.shape[1:]).to(self._spec.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode_family(
        self, q_SNH: torch.Tensor, new_SRH: torch.Tensor, kv: torch.Tensor, family: Decodes, scale: float
    ) -> torch.Tensor:
        """The common positions once for all, each one's rest, and the two joined in float32."""
        assert family.common_R is not None
        spec, num, groups = self._spec, len(q_SNH), self._num_groups
        q_SKGH = q_SNH.reshape(num, spec.num_kv_heads, groups, spec.head_dim)
        keys, values = self._gather(kv, family.common_R, 1)
        q_1KRH = q_SKGH.transpose(0, 1).reshape(1, spec.num_kv_heads, num * groups, spec.head_dim)
        out_1KRH, lse_1KR = _flash(q_1KRH, keys, values, 0.0, False, scale=scale)
        common_SKGH = out_1KRH.view(spec.num_kv_heads, num, groups, spec.head_dim).transpose(0, 1).float()
        lse_SKG = lse_1KR.view(spec.num_kv_heads, num, groups).transpose(0, 1)
        if family.paged is not None:
            assert self._paged is not None
            out_SNH, lse_SN = self._paged.attend(q_SNH, kv, family.paged, scale)
            share_SKG1 = torch.sigmoid(lse_SN.view(lse_SKG.shape) - lse_SKG).unsqueeze(-1)
            joined_SKGH = torch.lerp(common_SKGH, out_SNH.view(common_SKGH.shape), share_SKG1)
            return joined_SKGH.reshape(q_SNH.shape).to(spec.dtype)
        joined_SKGH = torch.empty_like(common_SKGH)
        for rest in family.groups:
            rows = rest.rows
            q_RKGH, keys, values = self._operands(q_SNH[rows], new_SRH[rows], kv, rest)
            out_RKGH, lse_RKG = self._part(q_RKGH, keys, values, rest.mask_S11L, scale)
            share_RKG1 = torch.sigmoid(rest.collect(lse_RKG) - lse_SKG[rows]).unsqueeze(-1)
            joined_SKGH[rows] = torch.lerp(common_SKGH[rows], rest.collect(out_RKGH).float(), share_RKG1)
        return joined_SKGH.reshape(q_SNH.shape).to(spec.dtype)

    def _part(
        self,
        q_SKGH: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask_S11L: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over some of the positions: [S, K, G, H], and the log-sum-exp of the scores [S, K, G]."""
        if not self._multiplies:
            return _flash(q_SKGH, keys, values, 0.0, False, attn_mask=mask_S11L, scale=scale)
        scores_SKGL = _scores(q_SKGH, keys, mask_S11L, scale)
        weights_SKGL = scores_SKGL.softmax(-1)
        # The largest weight is exp(largest score - lse): a fourth of the time of torch.logsumexp.
        lse_SKG = scores_SKGL.amax(-1).sub_(weights_SKGL.amax(-1).log_())
        return _weighted(weights_SKGL, values), lse_SKG

    def _operands(
        self, q_SNH: torch.Tensor, new_SRH: torch.Tensor, kv: torch.Tensor, group: DecodeGroup
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [S, K, G, H], and a group's keys and values [S, K, L, H] from its copies or gathered."""
        spec, num = self._spec, group.num_places
        if group.copies is None:
            assert group.runs_R is not None
            keys, values = self._gather(kv, group.runs_R, num)
        else:
            dense = self._copies(new_SRH, kv, group)
            keys, values = dense.view(2, num, spec.num_kv_heads, -1, spec.head_dim)
        return group.spread(q_SNH).reshape(num, spec.num_kv_heads, self._num_groups, spec.head_dim), keys, values

    def _copies(self, new_SRH: torch.Tensor, kv: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        """The group's copies of this layer, with the new positions."""
        assert group.copies is not None
        spec, copies, layer = self._spec, group.copies, kv.data_ptr()
        runs_a_position = 2 * spec.num_kv_heads / spec.block_size
        storage = copies.storage.layers.get(layer)
        if storage is None:
            num_runs = int(copies.storage.num_positions * runs_a_position)
            storage = copies.storage.layers[layer] = untouched_zeros((num_runs, self._run_values), spec.dtype)
        dense = storage[: int(group.num_places * copies.room * runs_a_position)]
        if group.runs_R is not None:
            return torch.index_select(kv.view(-1, self._run_values), 0, group.runs_R, out=dense)
        assert group.slots_R is not None
        return dense.view(-1, spec.head_dim).index_copy_(0, group.slots_R, new_SRH.flatten(0, 1))

    def _plan(
        self,
        members: list[int],
        lengths: list[int],
        starts: list[int],
        layout: TokenLayout,
        is_plain: bool,
        common_R: torch.Tensor | None = None,
        num_common: int = 0,
        *,
        window: int | None = None,
    ) -> Decodes:
        """What to compute for the decodes `members`, which have `num_common` blocks in common."""
        if self._paged is None or not is_plain:
            order, groups = self._groups.plan(members, lengths, layout, num_common=num_common, window=window)
            return Decodes(rows_of(order, starts), groups, common_R)
        first = num_common * self._spec.block_size
        spans = [(max(first, lengths[index] - window) if window else first, lengths[index]) for index in members]
        paged = self._paged.plan([layout.block_tables[index] for index in members], spans)
        return Decodes(rows_of(members, starts), [], common_R, paged)

    def _families(
        self, decoding: list[int], lengths: list[int], layout: TokenLayout
    ) -> Iterator[tuple[list[int], int]]:
        """Sequences that begin with the same blocks, and how many of those they have in common (full ones only)."""
        by_first: dict[int, list[int]] = {}
        for index in decoding:
            if lengths[index] > _LEAST_COMMON:
                by_first.setdefault(layout.block_tables[index][0], []).append(index)
        for members in by_first.values():
            if len(members) < _LEAST_MEMBERS:
                continue
            most = min((lengths[index] - 1) // self._spec.block_size for index in members)
            tables = np.array([layout.block_tables[index][:most] for index in members])
            differs = (tables != tables[0]).any(axis=0)
            num_common = int(differs.argmax()) if differs.any() else most
            num_common -= num_common % self._blocks_multiple
            if num_common * self._spec.block_size >= _LEAST_COMMON:
                yield members, num_common


def _compiled(spec: KVCacheSpec) -> PagedDecode | None:
    """The compiled loop, where the cache is what it is made for and the extra `cpu` is installed."""
    if spec.dtype != torch.bfloat16 or spec.block_size % 4 or spec.head_dim % 2:
        return None
    try:
        from models.attention.cpu_paged import IS_AVAILABLE, PagedDecode
    except ImportError:  # not installed, or it does not know this numpy yet
        return None
    return PagedDecode(spec) if IS_AVAILABLE else None


def _scores(q_SKGH: torch.Tensor, keys: torch.Tensor, mask_S11L: torch.Tensor, scale: float) -> torch.Tensor:
    """[S, K, G, L] in float32; the products were rounded to the cache's dtype, as in transformers' eager attention.

    Keys are the left factor: oneDNN reorders the right one, here the few queries (737 against 987 us for 32 sequences
    of 192 positions, 8 heads of 128, 2 rows a head; two threads, Intel Xeon with AMX).
    """
    sequences, heads, groups, dim = q_SKGH.shape
    products_BLG = torch.bmm(keys.reshape(-1, keys.shape[2], dim), q_SKGH.reshape(-1, groups, dim).mT)
    products_SKGL = products_BLG.view(sequences, heads, -1, groups).mT
    scores_SKGL = torch.empty(sequences, heads, groups, keys.shape[2])
    return torch.add(mask_S11L, products_SKGL, alpha=scale, out=scores_SKGL)


def _weighted(weights_SKGL: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[S, K, G, H]: the sum of the `values`, each by its weight."""
    sums_BGH = torch.bmm(weights_SKGL.to(values.dtype).flatten(0, 1), values.reshape(-1, *values.shape[2:]))
    return sums_BGH.view(*weights_SKGL.shape[:3], -1)


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory when they are first written; `torch.zeros` writes them all (5 GB and 20 s at start). And
    numpy asks for pages of 2 MiB, which read faster."""
    num_bytes = prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(shape)
