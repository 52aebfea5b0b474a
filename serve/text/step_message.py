"""One step as integers: what the driver tells the other ranks, so that they make the same calls of the model.

A `Step` says which tokens of which sequences are computed and for which positions logits are. Sampling, grammars,
drafting and beams need no word here: they follow from the logits, which the driver has. Block tables are most of what a
step says and hardly ever change: each is sent once, to a numbered slot, and from then on what is appended to it. What
rejected drafts took back is found by comparing, not by rules.

A message is 32-bit integers in the machine's order:

    rows | tokens | wanted (-1: all, in order) | copies | scored | pending | ints of changes
    token ids | tokens of each row | start of each row | slot of each row | wanted
    | copies (from, to) | scored (first, stop) | pending | changes (slot, kept, added, blocks ...)

Nobody says that a sequence has ended. Tables that were not used while `capacity` others were are forgotten by both
sides when their slots are given to new ones; should one come back it is sent again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from models.attention.base import TokenLayout

_HEADER = 7
_ALL = -1


@dataclass(slots=True)
class Step:
    """What one step makes the model compute."""

    token_ids: list[int]
    """Of all rows, flat; 0 where `pending` says so."""
    positions: list[int]
    """Of those tokens in their sequences; they follow from the layout and are not sent."""
    layout: TokenLayout
    wanted: list[int] = field(default_factory=list)
    """Places in `token_ids` whose logits are asked for, all at once and in this order."""
    wants_all: bool = False
    """Whether these are all places, one after the other."""
    scored: list[tuple[int, int]] = field(default_factory=list)
    """(first, stop) of places in `token_ids` whose logits are asked for before those, slice after slice."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(from, to): blocks to be copied before anything is computed."""
    pending: list[int] = field(default_factory=list)
    """Places in `token_ids` whose tokens are on the driver's device only, which broadcasts them before the forward."""


@dataclass(slots=True)
class _Known:
    """A block table that the other ranks have."""

    table: array[int]
    """The sequence's own array: held, so that its address belongs to nobody else."""
    slot: int
    sent: array[int] = field(default_factory=lambda: array("i"))
    length: int = -1
    """Of the table when it was last compared; -1: compare again, for its last blocks may have been drafts' only."""


class StepEncoder:
    """The driver's side. Every message must reach every decoder, in order."""

    def __init__(self, capacity: int, block_size: int):
        """`capacity`: block tables to remember, at least as many as a step may have rows."""
        self._capacity = capacity
        self._block_size = block_size
        self._young: dict[int, _Known] = {}  # by the address of the table
        self._old: dict[int, _Known] = {}
        self._free: list[int] = []
        self._num_slots = 0

    def encode(self, step: Step) -> memoryview:
        layout = step.layout
        slots: list[int] = []
        changes: list[int] = []
        young = self._young
        for table, num_new in zip(layout.block_tables, layout.num_new):
            known = young.get(id(table))
            if known is None or num_new != 1 or known.length != len(table):
                assert isinstance(table, array)
                end = layout.num_computed[len(slots)] + num_new
                known = self._change(table, changes)
                is_settled = num_new == 1 and len(table) * self._block_size < end + self._block_size
                known.length = len(table) if is_settled else -1
                young = self._young
            slots.append(known.slot)
        values = [
            len(slots),
            len(step.token_ids),
            _ALL if step.wants_all else len(step.wanted),
            len(step.copies),
            len(step.scored),
            len(step.pending),
            len(changes),
            *step.token_ids,
            *layout.num_new,
            *layout.num_computed,
            *slots,
        ]
        if not step.wants_all:
            values += step.wanted
        values += chain.from_iterable(step.copies)
        values += chain.from_iterable(step.scored)
        values += step.pending
        values += changes
        return memoryview(array("i", values)).cast("B")

    def _change(self, table: array[int], changes: list[int]) -> _Known:
        """The table's entry, brought up to date; what of it is news goes to `changes`."""
        known = self._young.get(id(table)) or self._remember(table)
        sent = known.sent
        if sent != table:
            kept = len(sent)
            if sent != table[:kept]:
                kept = next((i for i, (a, b) in enumerate(zip(sent, table)) if a != b), min(len(sent), len(table)))
            added = table[kept:]
            changes += (known.slot, kept, len(added))
            changes += added
            sent[kept:] = added
        return known

    def _remember(self, table: array[int]) -> _Known:
        known = self._old.pop(id(table), None)
        if len(self._young) >= self._capacity:
            self._free += [forgotten.slot for forgotten in self._old.values()]
            self._old, self._young = self._young, {}
        if known is None:
            if not self._free:
                self._free.append(self._num_slots)
                self._num_slots += 1
            known = _Known(table, self._free.pop())
        self._young[id(table)] = known
        return known


class StepDecoder:
    """A peer's side. The tables of the layouts it gives are its own: they live as long as the sequence's do and
    change as those do, which attention may rely on."""

    def __init__(self) -> None:
        self._tables: list[array[int]] = []

    def decode(self, message: memoryview) -> Step:
        values = message.cast("i").tolist()
        num_rows, num_tokens, num_wanted, num_copies, num_scored, num_pending, num_changes = values[:_HEADER]
        at = _HEADER

        def take(num: int) -> list[int]:
            nonlocal at
            at += num
            part: list[int] = values[at - num : at]
            return part

        token_ids, num_new, starts, slots = take(num_tokens), take(num_rows), take(num_rows), take(num_rows)
        wants_all = num_wanted == _ALL
        wanted = list(range(num_tokens)) if wants_all else take(num_wanted)
        copies, scored = _pairs(take(2 * num_copies)), _pairs(take(2 * num_scored))
        pending = take(num_pending)
        self._apply(take(num_changes))
        tables = self._tables
        layout = TokenLayout(num_new, starts, [tables[slot] for slot in slots])
        positions = [place for start, num in zip(starts, num_new) for place in range(start, start + num)]
        return Step(token_ids, positions, layout, wanted, wants_all, scored, copies, pending)

    def _apply(self, changes: list[int]) -> None:
        at = 0
        while at < len(changes):
            slot, kept, num_added = changes[at : at + 3]
            at += 3 + num_added
            added = array("i", changes[at - num_added : at])
            if slot == len(self._tables):
                self._tables.append(array("i"))
            if kept:
                self._tables[slot][kept:] = added
            else:
                self._tables[slot] = added


def _pairs(values: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(values[::2], values[1::2]))
