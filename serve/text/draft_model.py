"""Drafts from a small model with the target's vocabulary, one token after the other.

It has weights and cache tensors of its own and no blocks: its cache is indexed by the scheduler's block tables, as the
target's is. What of a sequence it has computed it knows itself and it catches up on the rest, whatever the reason
(the prompt, steps without drafts, preemption), before it drafts. A prefix that the target found in its cache may be in
this one or not: for every block it keeps the hash of the prefix it computed there, to be compared with the sequence's,
and what does not agree is computed. Another sequence may read the block meanwhile; it finds the same values again.
An error here would cost drafts, never a wrong output.

Drafts are drawn from the model's own distribution after everything the request asks for (penalties, temperature, masks,
filters): where the target's is shaped, a draft of the unshaped one would often be impossible. With coupled draws they
take the noise of plain sampling, with rejection sampling a stream of their own (`speculative.py`).

Legend: T new tokens, D hidden size, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.staging import Staging
from models.text.base import CausalLM, StepContext
from serve.text.gumbel import Stream
from serve.text.proposer import Proposed
from serve.text.sampler import TokenSampler
from serve.text.sequence import Row
from serve.transfer import to_device


@dataclass(slots=True)
class _Cached:
    """What of a sequence's blocks this model has computed."""

    epoch: int
    num_tokens: int
    """Leading tokens that were known when they were computed."""
    drafts: list[int] = field(default_factory=list)
    """Tokens computed behind them, right or wrong."""
    num_signed: int = 0
    """Leading blocks whose hash is entered."""
    table: list[int] = field(default_factory=list)
    """The block table, another list after drafts that did not hold: attention may keep what it gathered of a list whose
    positions were written once."""


class DraftModel:
    """A `Proposer`. Computes at most `max_num_tokens` positions in one forward."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        cache: KVCacheSpec,
        *,
        num_blocks: int,
        max_num_tokens: int,
        rejects: bool = False,
    ):
        self.model = model
        self._attention = attention
        self._kv_cache = attention.allocate(num_blocks)
        self._staging = Staging(cache.device)
        self._block_size = cache.block_size
        self._device = cache.device
        self._max_num_tokens = max_num_tokens
        self._rejects = rejects
        self._cached: dict[str, _Cached] = {}
        self._hashes: list[bytes | None] = [None] * num_blocks
        """Of each block: the hash of the tokens computed in it and of all before them. None: not all of them are."""

    def propose(self, rows: Seq[Row], sampler: TokenSampler) -> Proposed:
        proposed = Proposed()
        drafting = self._catch_up(rows, proposed)
        if not drafting:
            return proposed
        num_drafts = 0
        while True:
            logits_RV = self.model.logits(drafting.hidden_RD)
            self._draw(logits_RV, drafting.rows, sampler, proposed)
            num_drafts += 1
            kept = [i for i, row in enumerate(drafting.rows) if row.num_drafts > num_drafts]
            if not kept:
                return proposed
            drafting = self._advance([drafting.rows[i] for i in kept])

    def release(self, job_id: str) -> None:
        self._cached.pop(job_id, None)

    # -- computing -------------------------------------------------------------------------------------------------

    def _catch_up(self, rows: Seq[Row], proposed: Proposed) -> _Drafting | None:
        """Compute the known tokens of rows that want drafts. Those of whom all are computed now; None when of none."""
        left = self._max_num_tokens
        chunks: list[tuple[Row, int, int]] = []
        for row in rows:
            end = row.start + len(row.token_ids)
            if not row.num_drafts or not left or end + row.num_drafts > self.model.spec.max_positions:
                continue
            cached = self._find(row)
            start = cached.num_tokens
            proposed.is_typical &= end - start <= 2  # the newest token, and the last draft when all were accepted
            stop = min(end, start + left)
            left -= stop - start
            self._note(row, cached, stop)
            chunks.append((row, start, stop))
        if not chunks:
            return None
        hidden_TD = self._forward(
            [row.job.token_ids[start:stop] for row, start, stop in chunks],
            [start for _, start, _ in chunks],
            [row for row, _, _ in chunks],
        )
        complete, last, at = [], [], -1
        for row, start, stop in chunks:
            at += stop - start
            if stop == row.start + len(row.token_ids):
                complete.append(row)
                last.append(at)
        return _Drafting(complete, hidden_TD[to_device(last, self._device)]) if complete else None

    def _advance(self, rows: list[Row]) -> _Drafting:
        """Compute the newest draft of every row."""
        for row in rows:
            self._cached[row.job.id].drafts.append(row.drafts[-1])
        ends = [row.start + len(row.token_ids) + len(row.drafts) - 1 for row in rows]
        return _Drafting(rows, self._forward([row.drafts[-1:] for row in rows], ends, rows))

    def _forward(self, new: list[list[int]], starts: list[int], rows: list[Row]) -> torch.Tensor:
        ids = [token_id for token_ids in new for token_id in token_ids]
        positions = [start + i for start, token_ids in zip(starts, new) for i in range(len(token_ids))]
        ids_T, positions_T = self._staging.put(ids, torch.int64), self._staging.put(positions, torch.int64)
        tables = [self._cached[row.job.id].table for row in rows]
        layout = TokenLayout([len(token_ids) for token_ids in new], starts, tables)
        context = StepContext(self._attention, self._attention.plan(layout, self._staging), self._kv_cache)
        self._staging.send()
        return self.model.forward(ids_T, positions_T, context)

    def _draw(self, logits_RV: torch.Tensor, rows: list[Row], sampler: TokenSampler, proposed: Proposed) -> None:
        """Append a draft to every row."""
        draws = [row.after(len(row.drafts)) for row in rows]
        plan = sampler.plan(draws, self._staging, stream=Stream.DRAFT if self._rejects else Stream.TARGET)
        inputs_R = self._staging.put([row.token_ids[-1] for row in draws], torch.int64) if plan.needs_inputs else None
        self._staging.send()
        sampled = sampler.sample(logits_RV, plan, inputs_R, keeps_scores=self._rejects)
        if sampled.processed_RV is not None:
            for i, row in enumerate(rows):
                if not row.job.sampling.is_greedy:
                    proposed.scores.setdefault(row.job.id, []).append(sampled.processed_RV[i])
        for row, token_id in zip(rows, sampled.token_ids_R.tolist()):
            row.drafts.append(token_id)

    # -- what is computed already ----------------------------------------------------------------------------------

    def _find(self, row: Row) -> _Cached:
        """How far this model's cache is right for the row's known tokens, the newest left out: it gives the logits."""
        job, most, num_held = row.job, row.start + len(row.token_ids) - 1, 0
        cached = self._cached.get(job.id)
        if cached is None or cached.epoch != row.epoch:
            cached = self._cached[job.id] = _Cached(row.epoch, 0)
            for block, key in zip(row.block_table, job.block_hashes):
                if self._hashes[block] != key:
                    break
                cached.num_signed += 1
            cached.num_tokens = cached.num_signed * self._block_size
        else:
            for draft in cached.drafts:
                if cached.num_tokens >= most or job.token_ids[cached.num_tokens] != draft:
                    break
                cached.num_tokens += 1
                num_held += 1
        if num_held < len(cached.drafts):
            cached.table = []
        cached.drafts = []
        cached.table[:] = row.block_table
        cached.num_tokens = min(cached.num_tokens, most)
        cached.num_signed = min(cached.num_signed, cached.num_tokens // self._block_size)
        return cached

    def _note(self, row: Row, cached: _Cached, num_tokens: int) -> None:
        """`num_tokens` of the row will be computed, and perhaps drafts behind them: sign the blocks that are full."""
        size, hashes = self._block_size, row.job.block_hashes
        end = row.start + len(row.token_ids) + row.num_drafts
        for place in range(cached.num_tokens // size, min(-(-end // size), len(row.block_table))):
            self._hashes[row.block_table[place]] = None
        cached.num_tokens = num_tokens
        while cached.num_signed < min(num_tokens // size, len(hashes)):
            self._hashes[row.block_table[cached.num_signed]] = hashes[cached.num_signed]
            cached.num_signed += 1


@dataclass(slots=True)
class _Drafting:
    """Rows that draft on, and what the model has computed of their newest tokens."""

    rows: list[Row]
    hidden_RD: torch.Tensor
