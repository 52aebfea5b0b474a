"""Who gets draft tokens behind its decode, and the blocks they take until it is known which of them hold.

Drafts get what is left over: budget and free blocks that no decode and no prefill of the step wants. Nobody is
preempted for one. Blocks are taken as if all drafts held, and freed as steps are settled: `Sequence.num_scheduled`
comes down with every draft that is rejected and so stays an upper bound of what the steps in flight write. A block
beyond it and beyond the known tokens is written by nobody, though a step in flight may have its number.

Where the runner keeps drafts on the device (`runs_ahead`), a sequence goes on while its drafts are in flight, with a
plain decode or with drafts behind drafts. The first drafts of a row are made from known tokens and at most one more;
later ones from what the step before left on the device, so that step must have drafted too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from serve.text.kv_cache import KVCache
from serve.text.sequence import Row, Sequence


class Drafting:
    """A scheduler's drafts. `watermark`: blocks that drafts leave free."""

    def __init__(self, kv_cache: KVCache, watermark: int, *, runs_ahead: bool):
        self._kv_cache = kv_cache
        self._watermark = watermark
        self._runs_ahead = runs_ahead
        self._rows: dict[Sequence, Row] = {}  # of the last step, if any of them was to draft
        self._provisional: set[Sequence] = set()

    @property
    def holds_blocks(self) -> bool:
        """Whether blocks are on their way back that were taken for drafts in flight."""
        return bool(self._provisional)

    def may_run_ahead(self, seq: Sequence) -> bool:
        """Whether steps of it need nothing from the host but what is known before its drafts are verified."""
        return self._runs_ahead and seq.may_speculate and seq.matcher is None and not seq.sampling.needs_history

    def may_follow(self, seq: Sequence, num_drafts: int) -> bool:
        """Whether a decode can be planned whose newest token is in flight, with up to `num_drafts` drafts behind it."""
        if not seq.num_draftable(num_drafts):
            return True
        if not seq.may_run_ahead:
            return False
        row = self._rows.get(seq)
        return seq.num_pending == 1 or (row is not None and bool(row.drafts))

    def grow(self, seq: Sequence) -> bool:
        """Take what the next step of a decode needs; False, and nothing taken, when it is not free."""
        num_blocks = len(seq.blocks)
        has_room = seq.grow(self._kv_cache)
        if seq.num_in_doubt and len(seq.blocks) > num_blocks:
            self._provisional.add(seq)
        return has_room

    def plan(self, plan: Iterable[Sequence], num_drafts: int, left: int) -> dict[Sequence, int]:
        """How many drafts each decode of a planned step gets, of `left` positions in all."""
        drafts: dict[Sequence, int] = {}
        cache = self._kv_cache
        for seq in plan:
            start = seq.num_scheduled + 1
            if not seq.may_speculate or start != len(seq.token_ids) + seq.num_pending:
                continue
            most = min(seq.num_draftable(num_drafts), left)
            while start + most > len(seq.blocks) * cache.block_size:
                if cache.num_free <= self._watermark or not cache.extend(seq.blocks):
                    most = len(seq.blocks) * cache.block_size - start
                    break
                self._provisional.add(seq)
            if most > 0:
                drafts[seq] = most
                left -= most
        return drafts

    def follow(self, rows: list[Row], drafts: dict[Sequence, int]) -> None:
        """A step is scheduled. The runner will tell its rows how many drafts there are."""
        self._rows = {row.job: row for row in rows} if drafts else {}

    def settle(self, seq: Sequence, row: Row, num_accepted: int, num_kept: int) -> None:
        """The positions of accepted drafts are computed, the others will be written again."""
        seq.num_drafted += len(row.drafts)
        seq.num_accepted += min(num_accepted, num_kept)
        seq.num_in_doubt -= row.num_drafts
        seq.num_pending -= row.num_drafts
        seq.num_scheduled -= row.num_drafts - num_accepted
        seq.num_computed = row.start + 1 + min(num_accepted, num_kept)
        self._kv_cache.free(self._spare(seq))

    def forget(self, seq: Sequence) -> array[int]:
        """Its drafts in flight mean nothing any more. The blocks they took, for the caller to free in time."""
        seq.num_in_doubt = 0
        return self._spare(seq)

    def release(self, seq: Sequence) -> None:
        """It gives all its blocks back."""
        self._provisional.discard(seq)

    def _spare(self, seq: Sequence) -> array[int]:
        """Cut off the blocks behind all that is known or scheduled."""
        size, num_known = self._kv_cache.block_size, len(seq.token_ids)
        num_blocks = -(-max(num_known, seq.num_scheduled) // size)
        spare = seq.blocks[num_blocks:]
        del seq.blocks[num_blocks:]
        if not seq.num_in_doubt or len(seq.blocks) * size < num_known + size:
            self._provisional.discard(seq)
        return spare
