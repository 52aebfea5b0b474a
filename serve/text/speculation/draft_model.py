"""Drafts from a small model with the target's vocabulary, one token after the other.

It has weights and cache tensors of its own and no blocks: its cache is indexed by the scheduler's block tables, as the
target's is. What of a sequence it has computed it knows itself and it catches up on the rest, whatever the reason
(the prompt, steps without drafts, preemption), before it drafts. A prefix that the target found in its cache may be in
this one or not: for every block it keeps the hash of the prefix it computed there, to be compared with the sequence's,
and what does not agree is computed. Another sequence may read the block meanwhile; it finds the same values again.
An error here would cost drafts, never a wrong output.

Drafts are drawn from the model's own distribution after everything the request asks for (penalties, temperature, masks,
filters): where the target's is shaped, a draft of the unshaped one would often be impossible. With coupled draws they
take the noise of plain sampling, with rejection sampling a stream of their own (`verification.py`).

When it runs ahead, drafts stay on the device but for rows whose draws need them on the host (grammars, penalties).
Behind drafts that are still in flight it does not know how many of them it has computed rightly, only that all are but
perhaps the last, which no draft came from. So it computes the newest token and, once more or for the first time, the
one before it; both are on the device.

Legend: T new tokens, D hidden size, S rows of the step, R rows that draft, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.device_queue import DeviceQueue
from models.staging import Staging
from models.text.base import CausalLM, StepContext
from serve.text.cuda_graph import DecodeGraphs
from serve.text.sampling.gumbel import Stream
from serve.text.sampling.sampler import TokenSampler
from serve.text.sequence import PENDING, Row
from serve.text.speculation.proposer import Proposed, Tails
from serve.text.step_inputs import StepInputs
from serve.transfer import to_device

_NEWEST, _BEFORE = 0, 1
"""Tokens that only the device knows: those of `Tails`."""
_CAPACITY = 1 << 20
"""Bytes of a copy to the device, block tables not counted."""
_NUM_BUFFERS = 36
"""A draft takes two copies, for the forward and the draw: two steps of eight drafts, and the tokens before them."""
_MOST_CAUGHT_UP = 2
"""New tokens of a row that drafted in the step before: the newest, and the last draft when all held."""


@dataclass(slots=True)
class _Cached:
    """What of a sequence's blocks this model has computed."""

    epoch: int
    num_tokens: int
    """Leading tokens that were known when they were computed."""
    drafts: list[int] = field(default_factory=list)
    """Those of the last row that drafted: all but the last were computed behind these tokens, right or wrong."""
    num_signed: int = 0
    """Leading blocks whose hash is entered."""
    table: array[int] = field(default_factory=lambda: array("i"))
    """The block table, another array after drafts that did not hold: attention may keep what it gathered of a table
    whose positions were written once."""


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
        runs_ahead: bool = False,
        max_rows_in_graph: int = 0,
        max_model_len: int = 0,
        queue: DeviceQueue | None = None,
    ):
        """`max_rows_in_graph`: forwards of up to so many rows with one or two new tokens run as CUDA graphs, for which
        `max_model_len` is needed. `queue`: as the runner's."""
        assert not (rejects and runs_ahead), "rejection sampling decides on drafts that the host knows"
        self.model = model
        self.runs_ahead = runs_ahead
        self._attention = attention
        self._kv_cache = attention.allocate(num_blocks + 1)
        table_bytes = max_rows_in_graph * -(-max_model_len // cache.block_size) * 4
        self._staging = Staging(cache.device, _CAPACITY + table_bytes, queue, _NUM_BUFFERS)
        self.graphs: DecodeGraphs | None = None
        if max_rows_in_graph:
            self.graphs = DecodeGraphs(
                model,
                attention,
                self._kv_cache,
                staging=self._staging,
                own_table=array("i", [num_blocks] * -(-_MOST_CAUGHT_UP // cache.block_size)),
                max_rows=max_rows_in_graph,
                max_width=_MOST_CAUGHT_UP,
            )
        self._block_size = cache.block_size
        self._device = cache.device
        self._max_num_tokens = max_num_tokens
        self._rejects = rejects
        self._cached: dict[str, _Cached] = {}
        self._hashes: list[bytes | None] = [None] * num_blocks
        """Of each block: the hash of the tokens computed in it and of all before them. None: not all of them are."""

    def propose(self, rows: Seq[Row], sampler: TokenSampler, tails: Tails | None) -> Proposed:
        proposed = Proposed()
        drafting = self._catch_up(rows, proposed, tails)
        if drafting is None:
            return proposed
        num_drafts = 0
        while True:
            drawn_R = self._draw(drafting, sampler, proposed)
            num_drafts += 1
            kept = [i for i, row in enumerate(drafting.rows) if row.num_drafts > num_drafts]
            if not kept:
                return proposed
            drafting = self._advance(drafting, kept, drawn_R)

    def release(self, job_id: str) -> None:
        self._cached.pop(job_id, None)

    # -- computing -------------------------------------------------------------------------------------------------

    def _catch_up(self, rows: Seq[Row], proposed: Proposed, tails: Tails | None) -> _Drafting | None:
        """Compute the newest tokens of rows that want drafts. Those of whom all are computed now; None when of none."""
        left = self._max_num_tokens
        chunks: list[_Chunk] = []
        for i, row in enumerate(rows):
            end = row.start + len(row.token_ids)
            least = 2 if row.num_in_doubt else 1
            if not row.num_drafts or left < least or end + row.num_drafts > self.model.spec.max_positions:
                continue
            chunk = self._follow(i, row) if row.num_in_doubt else self._chunk(i, row, left)
            chunks.append(chunk)
            left -= len(chunk.token_ids)
            proposed.is_typical &= chunk.is_complete and len(chunk.token_ids) <= _MOST_CAUGHT_UP
        if not chunks:
            return None
        behind_C = None
        if tails is not None and tails.behind_S is not None:
            behind_C = tails.behind_S[to_device([chunk.index for chunk in chunks], self._device)]
        hidden_TD = self._forward(
            [token_id for chunk in chunks for token_id in chunk.token_ids],
            [len(chunk.token_ids) for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.row for chunk in chunks],
            behind_C,
            self._newest(chunks, tails),
        )
        ends = accumulate(len(chunk.token_ids) for chunk in chunks)
        complete = [(i, end - 1) for i, (chunk, end) in enumerate(zip(chunks, ends)) if chunk.is_complete]
        if not complete:
            return None
        kept, last = to_device(list(zip(*complete)), self._device)
        for i, _ in complete:
            self._cached[chunks[i].row.job.id].drafts = chunks[i].drafts
        return _Drafting(
            [chunks[i].row for i, _ in complete], hidden_TD[last], None if behind_C is None else behind_C[kept]
        )

    def _chunk(self, index: int, row: Row, most: int) -> _Chunk:
        """Up to `most` of the row's tokens that are not computed."""
        cached = self._find(row)
        start, end = cached.num_tokens, row.start + len(row.token_ids)
        stop = min(end, start + most)
        self._note(row, cached, stop)
        token_ids = row.job.token_ids[start:stop]
        if len(token_ids) == stop - start:
            return _Chunk(index, row, start, token_ids, stop == end, row.drafts)
        return _Chunk(index, row, start, [*token_ids, PENDING], True, row.drafts, (_NEWEST,))

    def _follow(self, index: int, row: Row) -> _Chunk:
        """The two newest tokens of a row behind its drafts in flight. What the host knows by now is computed: it was
        input to steps that drafted. How far the drafts reach it will not be told, so none counts."""
        cached = self._cached[row.job.id]
        cached.table = row.block_table[:]
        self._note(row, cached, len(row.job.token_ids))
        unknown = [PENDING, PENDING]
        return _Chunk(index, row, row.start - 1, unknown, True, unknown, (_BEFORE, _NEWEST))

    def _newest(self, chunks: list[_Chunk], tails: Tails | None) -> torch.Tensor | None:
        """What PENDING stands for in the chunks, one after the other; None when it is not in them."""
        wanted = [(kind, chunk.index) for chunk in chunks for kind in chunk.unknown]
        if not wanted:
            return None
        assert tails is not None
        kinds, at = to_device(list(zip(*wanted)), self._device)
        known = [tails.newest_S] if tails.before_S is None else [tails.newest_S, tails.before_S]
        return torch.stack(known)[kinds, at]

    def _advance(self, drafting: _Drafting, kept: list[int], drawn_R: torch.Tensor) -> _Drafting:
        """Compute the newest draft of the rows that want more."""
        rows, behind_R = drafting.rows, drafting.behind_R
        if len(kept) < len(rows):
            at = to_device(kept, self._device)
            rows, drawn_R = [rows[i] for i in kept], drawn_R[at]
            behind_R = None if behind_R is None else behind_R[at]
        starts = [row.start + len(row.token_ids) + len(row.drafts) - 1 for row in rows]
        return _Drafting(rows, self._forward(drawn_R, [1] * len(rows), starts, rows, behind_R), behind_R)

    def _forward(
        self,
        token_ids: list[int] | torch.Tensor,
        num_new: list[int],
        starts: list[int],
        rows: list[Row],
        behind_R: torch.Tensor | None,
        newest_P: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`newest_P`: what PENDING stands for in `token_ids`."""
        put, num_tokens = self._staging.put, sum(num_new)
        ids = [0] * num_tokens if isinstance(token_ids, torch.Tensor) else token_ids
        positions = [start + i for start, num in zip(starts, num_new) for i in range(num)]
        tables = [self._cached[row.job.id].table for row in rows]
        layout = TokenLayout(num_new, starts, tables, behind_R)
        graphs = self.graphs if self.graphs is not None and self.graphs.covers(layout) else None
        if graphs is not None:
            inputs = graphs.put(ids, positions, layout)
        else:
            inputs = StepInputs.put(ids, positions, layout, self._attention, self._staging)
        ids_T, positions_T = inputs.token_ids_T[:num_tokens], inputs.positions_T[:num_tokens]
        if newest_P is not None:
            places_P = put([i for i, token_id in enumerate(token_ids) if token_id == PENDING], torch.int64)
        rows_T = None if behind_R is None else put(np.repeat(np.arange(len(rows)), num_new), torch.int64)
        self._staging.send()
        if isinstance(token_ids, torch.Tensor):
            ids_T.copy_(token_ids)
        if newest_P is not None:
            ids_T[places_P] = newest_P
        if behind_R is not None:
            positions_T.sub_(behind_R[rows_T])
        if graphs is not None:
            return graphs.forward(inputs, layout)[:num_tokens]
        return self.model.forward(ids_T, positions_T, StepContext(self._attention, inputs.plan, self._kv_cache))

    def _draw(self, drafting: _Drafting, sampler: TokenSampler, proposed: Proposed) -> torch.Tensor:
        """Append a draft to every row; all of them, on the device."""
        rows = drafting.rows
        draws = [row.after(len(row.drafts)) for row in rows]
        plan = sampler.plan(draws, self._staging, stream=Stream.DRAFT if self._rejects else Stream.TARGET)
        inputs_R = self._staging.put([row.token_ids[-1] for row in draws], torch.int64) if plan.needs_inputs else None
        self._staging.send()
        sampled = sampler.sample(
            self.model.logits(drafting.hidden_RD),
            plan,
            inputs_R,
            None if drafting.behind_R is None else drafting.behind_R.long(),
            keeps_scores=self._rejects,
        )
        if sampled.processed_RV is not None:
            for i, row in enumerate(rows):
                if not row.job.sampling.is_greedy:
                    proposed.scores.setdefault(row.job.id, []).append(sampled.processed_RV[i])
        stay = [self.runs_ahead and row.job.may_run_ahead for row in rows]
        drawn = [PENDING] * len(rows) if all(stay) else sampled.token_ids_R.tolist()
        for row, stays, token_id in zip(rows, stay, drawn):
            row.drafts.append(PENDING if stays else token_id)
        if self.runs_ahead:
            proposed.drawn.append((rows, sampled.token_ids_R))
        return sampled.token_ids_R

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
            for draft in cached.drafts[:-1]:
                if cached.num_tokens >= most or job.token_ids[cached.num_tokens] != draft:
                    break
                cached.num_tokens += 1
                num_held += 1
        if num_held < len(cached.drafts) - 1:
            cached.table = array("i")
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


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens of one row that the model computes before it drafts."""

    index: int
    """Of the row, in the step."""
    row: Row
    start: int
    """As `Row.start`."""
    token_ids: list[int]
    is_complete: bool
    """Whether its newest token is among them."""
    drafts: list[int]
    """What `_Cached` has to compare."""
    unknown: tuple[int, ...] = ()
    """What PENDING stands for in `token_ids`, in order."""


@dataclass(frozen=True, slots=True)
class _Drafting:
    """Rows that draft on, and what the model has computed of their newest tokens."""

    rows: list[Row]
    hidden_RD: torch.Tensor
    behind_R: torch.Tensor | None
    """As `Tails.behind_S`."""
