"""Which decodes share a kernel call on CPU, and dense copies of what they have cached.

Torch's kernels want the keys of a sequence as one matrix, and its blocks lie scattered. To gather them at every step
costs as much as to compute with them (32 decodes over 192 positions, 8 heads of 128, bfloat16: 2.3 ms to gather, 2.4 to
attend; two threads, Intel Xeon with AMX). So a group keeps what it gathered, layer by layer, and a step adds only the
new position. A group is gathered anew when one joins it or outgrows its room, or when a quarter has left.

A member is recognised by its block table, the very list: tables only grow and their positions are written once, so a
copy of the first n positions stays right for as long as the list lives. Should a position have been computed without a
copy (a failed step, a step as part of a longer chunk), the lengths do not match and the group is gathered anew.

Legend: S sequences of a group, L positions (padded), K key/value heads, H head dimension, R runs (one head's keys or
values in one block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd, lcm

import numpy as np
import torch

from models.attention.base import KVCacheSpec, TokenLayout

_ROOM = 32
"""A group's room ends at a multiple of this many positions: it is gathered anew every 32 steps and on average 16
positions are computed in vain."""
_LEAST_PRESENT = 3 / 4
"""Share of a group's places that are in use, at least."""
_ALIGN = 16
"""What a window leaves out of a sequence is a multiple of this many positions, a full vector of float32."""
_GROUP_BYTES = 8 << 20
"""Keys and values of one group in one layer, per thread. More groups are more calls, larger ones pad short sequences
to the length of longer ones."""


@dataclass(slots=True, eq=False)
class Storage:
    """Memory for the copies of one group, used by one after the other: pages that are new cost more than the copying
    (17 MB: 8.5 against 1.5 ms)."""

    num_positions: int
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    """By the address of the layer's cache; runs, as many as `num_positions` need. Made by the first gather."""


@dataclass(slots=True, eq=False)
class DenseCopies:
    """Keys and values of some sequences, from block `first` on, each as one matrix: [2, S, K, L, H] a layer."""

    tables: list[Sequence[int] | None]
    """None: the sequence has left. Its place is computed in vain until the group is gathered anew."""
    lengths: list[int]
    """Positions of each sequence that will be there after this step, counted from the sequence's start."""
    first: int
    room: int
    """L."""
    storage: Storage


@dataclass(slots=True)
class DecodeGroup:
    """Sequences with one new token each, for one step."""

    rows: slice
    """Of its members, among those of all groups."""
    num_places: int
    places_S: torch.Tensor | None
    """Which of the places are theirs, where some have left. None: all."""
    runs_R: torch.Tensor | None
    """What to gather: keys of all sequences, then values. None: the copies lack only the new positions."""
    slots_R: torch.Tensor | None
    """Where those go in the copies, as rows of one head and position: by sequence, keys before values, head."""
    copies: DenseCopies | None
    """None: nothing is kept, since memory for it is used up."""
    mask_S11L: torch.Tensor
    """0 where the new position sees a key, -inf elsewhere; float32. Of all places."""

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """One row for every place; zeros for those who have left."""
        if self.places_S is None:
            return rows
        return rows.new_zeros(self.num_places, *rows.shape[1:]).index_copy_(0, self.places_S, rows)

    def collect(self, places: torch.Tensor) -> torch.Tensor:
        """The rows of those who are here."""
        return places if self.places_S is None else places[self.places_S]


class DecodeGroups:
    """Plans the groups of one model. `max_bytes`: of copies, over all layers."""

    def __init__(self, spec: KVCacheSpec, max_bytes: int):
        self._spec = spec
        self._max_bytes = max_bytes
        self._position_bytes = 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
        self._room_multiple = lcm(_ROOM, spec.block_size)
        self._window_multiple = _ALIGN // gcd(_ALIGN, spec.block_size)
        self._kept: list[DenseCopies] = []
        self._before: list[DenseCopies] = []
        self._spare: list[Storage] = []

    def begin_step(self) -> None:
        """Copies that the last step did not use are given up."""
        self._spare += [copies.storage for copies in self._before]
        self._before, self._kept = self._kept, []

    def plan(
        self,
        members: Sequence[int],
        lengths: Sequence[int],
        layout: TokenLayout,
        *,
        num_common: int = 0,
        window: int | None = None,
    ) -> tuple[list[int], list[DecodeGroup]]:
        """Groups of the decodes `members` of the layout, which are returned in the order of the groups. Their first
        `num_common` blocks are left out. Behind a sliding window nothing is kept."""
        limit = max(1, _GROUP_BYTES * torch.get_num_threads() // self._position_bytes)
        kept = [] if window else self._reusable(members, lengths, layout, num_common)
        new = set(members).difference(*(places for _, places in kept))
        if new:  # groups of less than half the size take newcomers in
            small = [pair for pair in kept if 2 * len(pair[1]) * pair[0].room < limit]
            kept = [pair for pair in kept if pair not in small]
            for copies, places in small:
                new.update(places)
                self._before.remove(copies)
                self._spare.append(copies.storage)
        groups: list[DecodeGroup] = []
        order: list[int] = []
        for copies, places in kept:
            groups.append(self._added(copies, slice(len(order), len(order) + len(places))))
            order += places
            self._kept.append(copies)
            self._before.remove(copies)
        firsts = {index: self._first(lengths[index], num_common, window) for index in new}
        for part in self._split(firsts, lengths, limit):
            rows = slice(len(order), len(order) + len(part))
            groups.append(self._gathered(part, rows, firsts, lengths, layout, window))
            order += part
        return order, groups

    def _reusable(
        self, members: Sequence[int], lengths: Sequence[int], layout: TokenLayout, first: int
    ) -> list[tuple[DenseCopies, list[int]]]:
        """Copies which lack exactly one new position of each member, and the members. Others of theirs are given up."""
        size = self._spec.block_size
        place_of = {id(layout.block_tables[index]): index for index in members}
        kept: list[tuple[DenseCopies, list[int]]] = []
        for copies in list(self._before):
            places = [None if table is None else place_of.get(id(table)) for table in copies.tables]
            present = [place for place in places if place is not None]
            if not present or copies.first != first:
                continue
            if len(present) >= _LEAST_PRESENT * len(places) and all(
                place is None or (lengths[place] == length + 1 and length < first * size + copies.room)
                for place, length in zip(places, copies.lengths, strict=True)
            ):
                for at, place in enumerate(places):
                    if place is None:
                        copies.tables[at] = None
                    else:
                        copies.lengths[at] = lengths[place]
                kept.append((copies, present))
            else:
                self._before.remove(copies)
                self._spare.append(copies.storage)
        return kept

    def _split(self, firsts: dict[int, int], lengths: Sequence[int], limit: int) -> list[list[int]]:
        """By length, in groups of at most `limit` padded positions; inside a group in the order of rows."""
        size = self._spec.block_size
        groups: list[list[int]] = []
        for index in sorted(firsts, key=lambda index: firsts[index] * size - lengths[index]):
            # the first of a group is its longest
            if not groups or (len(groups[-1]) + 1) * self._room(groups[-1][:1], firsts, lengths) > limit:
                groups.append([])
            groups[-1].append(index)
        return [sorted(group) for group in groups]

    def _first(self, length: int, num_common: int, window: int | None) -> int:
        """The first block that the newest position sees beyond `num_common`."""
        if window is None:
            return num_common
        first = max(0, length - window) // self._spec.block_size
        return first - first % self._window_multiple  # a key's place in its vector depends on its position only

    def _room(self, members: Sequence[int], firsts: dict[int, int], lengths: Sequence[int]) -> int:
        most = max(lengths[index] - firsts[index] * self._spec.block_size for index in members)
        return -(-most // self._room_multiple) * self._room_multiple

    def _added(self, copies: DenseCopies, rows: slice) -> DecodeGroup:
        heads, num = self._spec.num_kv_heads, len(copies.tables)
        at_S = np.array([at for at, table in enumerate(copies.tables) if table is not None])
        newest = np.array(copies.lengths) - 1 - copies.first * self._spec.block_size
        head_S2K = (np.arange(2)[:, None] * num + at_S[:, None, None]) * heads + np.arange(heads)
        slots_S2K = head_S2K * copies.room + newest[at_S][:, None, None]
        return DecodeGroup(
            rows,
            num,
            None if len(at_S) == num else torch.from_numpy(at_S),
            None,
            torch.from_numpy(slots_S2K.reshape(-1)),
            copies,
            self._mask(np.arange(copies.room) > newest[:, None]),
        )

    def _gathered(
        self,
        members: list[int],
        rows: slice,
        firsts: dict[int, int],
        lengths: Sequence[int],
        layout: TokenLayout,
        window: int | None,
    ) -> DecodeGroup:
        size, room = self._spec.block_size, self._room(members, firsts, lengths)
        ids: list[list[int]] = []
        for index in members:
            used = layout.block_tables[index][firsts[index] : -(-lengths[index] // size)]
            ids.append([*used, *[used[0]] * (room // size - len(used))])
        length_S1 = np.array([[lengths[index]] for index in members])
        positions_SL = np.array([[firsts[index] * size] for index in members]) + np.arange(room)
        hidden_SL = positions_SL >= length_S1
        copies = None
        if window is not None:
            hidden_SL |= positions_SL < length_S1 - window
        elif storage := self._storage(len(members) * room):
            tables: list[Sequence[int] | None] = [layout.block_tables[index] for index in members]
            copies = DenseCopies(tables, length_S1[:, 0].tolist(), firsts[members[0]], room, storage)
            self._kept.append(copies)
        runs_R = runs_of(np.array(ids), self._spec.num_kv_heads)
        return DecodeGroup(rows, len(members), None, runs_R, None, copies, self._mask(hidden_SL))

    def _storage(self, num_positions: int) -> Storage | None:
        """The smallest spare one that is large enough, else a new one, a quarter larger, for the group will grow."""
        fitting = [storage for storage in self._spare if storage.num_positions >= num_positions]
        if fitting:
            storage = min(fitting, key=lambda storage: storage.num_positions)
            self._spare.remove(storage)
            return storage
        new = Storage(-(-num_positions * 5 // 4 // self._room_multiple) * self._room_multiple)
        left = self._max_bytes // (self._position_bytes * self._spec.num_layers) - new.num_positions
        left -= sum(copies.storage.num_positions for copies in (*self._kept, *self._before))
        while self._spare and sum(storage.num_positions for storage in self._spare) > left:
            self._spare.pop(0)
        return new if left >= 0 else None

    def _mask(self, hidden_SL: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(hidden_SL, np.float32(-np.inf), np.float32(0)))[:, None, None]


def runs_of(block_ids: np.ndarray, num_kv_heads: int) -> torch.Tensor:
    """Runs of these blocks [sequences, blocks] in the order of a gather: keys and values, sequence, head, block."""
    of_block = np.arange(2 * num_kv_heads).reshape(2, 1, -1, 1)
    return torch.from_numpy((block_ids[None, :, None] * of_block.size + of_block).reshape(-1))


def rows_of(members: Sequence[int], starts: Sequence[int]) -> torch.Tensor | slice:
    """The rows of these sequences, which begin at `starts`; a slice, which copies nothing, where it can be one."""
    start = starts[members[0]]
    if all(starts[index] == start + place for place, index in enumerate(members)):
        return slice(start, start + len(members))
    return torch.tensor([starts[index] for index in members])
