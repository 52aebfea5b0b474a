"""Computes token batches: one model forward per step over all scheduled tokens, then one draw per sampling row.

Owns the model, the attention backend, the cache tensors and the sampler; decides nothing. A step goes

    rows → drafts → flat ids and positions → attention.plan → forward → logits where wanted → sampler → ids on the host

Rows that want drafts get them from the proposer first: known to the host, or to the device only.

On CPU `submit` computes and `collect` hands over. On CUDA `submit` queues everything, copies to pinned memory and an
event included, and `collect` waits for the event. Tokens still unknown on the host (PENDING), and by how many positions
rows begin earlier than the host has to assume, are read from what the previous step left on the device (`frontier.py`),
so that the next step can be queued before this one's tokens are known.

Legend: T new tokens of the step, D hidden size, R rows that sample, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.device_queue import DeviceQueue, queue_of
from models.staging import CAPACITY, Staging
from models.text.base import CausalLM, StepContext
from serve.engine.interface import DeviceFault
from serve.text.beams.candidates import find_candidates
from serve.text.cuda_graph import MAX_WIDTH, DecodeGraphs
from serve.text.flight import Flight, land, take_off
from serve.text.frontier import Frontier, SpeculativeStep
from serve.text.peers import Peers
from serve.text.prompt_scores import PromptScores, score_prompts, slices_of
from serve.text.sampling.sampler import Sampled, SamplingPlan, make_sampler
from serve.text.sequence import PENDING, Row, TokenBatch, TokenOutput
from serve.text.speculation.proposer import Proposed, Proposer, Tails
from serve.text.step_inputs import StepInputs
from serve.text.step_message import Step

log = logging.getLogger(__name__)

_CANARY_TOKENS = 4


@dataclass(slots=True)
class _Planned:
    """A step that is laid out, and told to the other ranks if there are any."""

    rows: list[Row]
    step: Step
    proposed: Proposed
    tails: Tails | None
    sources: list[int]
    """Of the step's pending tokens: their places in the frontier."""
    began_s: float
    draws: list[Row]
    """One entry per token that the step samples."""
    sampling: SamplingPlan | None = None
    speculative: SpeculativeStep | None = None
    computed: tuple[torch.Tensor, list[PromptScores], torch.Tensor | None] | None = None
    """Logits of the wanted positions (hidden states for want of such), scores of prompts, inputs that draws need."""


class TokenRunner:
    """A `Runner` over `TokenBatch`. One thread."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        cache: KVCacheSpec,
        *,
        num_blocks: int,
        max_model_len: int = 0,
        max_rows_in_graph: int = 0,
        max_drafts: int = 0,
        proposer: Proposer | None = None,
        rejects: bool = False,
        peers: Peers | None = None,
        clock: Callable[[], float] = time.perf_counter,
        queue: DeviceQueue | None = None,
    ):
        """Allocates `num_blocks` blocks for the scheduler and one more of its own, where the canary lives.

        Steps of up to `max_rows_in_graph` rows with `max_drafts` drafts at most run as CUDA graphs, for which
        `max_model_len` is needed. `rejects`: drafts are verified by rejection sampling; else draws are coupled
        (`speculation/verification.py`). `peers`: the other ranks, of which this one is the driver. `queue`: what the
        device is told to do; None: the device's own.
        """
        self.model = model
        self.device = cache.device
        self._attention = attention
        self.kv_cache = attention.allocate(num_blocks + 1)
        self._own_table = array("i", [num_blocks] * -(-MAX_WIDTH // cache.block_size))
        self._block_size = cache.block_size
        table_bytes = max_rows_in_graph * -(-max_model_len // cache.block_size) * 4
        self._queue = queue or queue_of(cache.device)
        self.staging = Staging(cache.device, CAPACITY + table_bytes, self._queue)
        self._sampler = make_sampler(model.spec.vocab_size, model.spec.eos_token_ids, cache.device)
        self._proposer = proposer
        self.runs_ahead = proposer is not None and proposer.runs_ahead
        """Whether it goes on from drafts that the host does not know."""
        self._rejects = rejects
        self._clock = clock
        self._collected_s = 0.0
        """When the last step was collected: a later one does not count the time before."""
        self.peers = peers
        self._computes_late = peers is not None and peers.num_stages > 1 and self._queue is None
        self._told: deque[_Planned] = deque()
        """Steps that are to be computed when they are collected."""
        self._frontier: Frontier | None = None
        """What the last submitted step leaves on the device."""
        self._last: Flight | None = None
        """The last submitted step."""
        self._canary_logits: torch.Tensor | None = None
        self._graphs: DecodeGraphs | None = None
        if max_rows_in_graph:
            self._graphs = DecodeGraphs(
                model,
                attention,
                self.kv_cache,
                staging=self.staging,
                own_table=self._own_table,
                max_rows=max_rows_in_graph,
                max_width=1 + max_drafts,
            )
        of_drafts = None if proposer is None else proposer.graphs
        self._all_graphs = [graphs for graphs in (self._graphs, of_drafts) if graphs is not None]

    # -- the contract ----------------------------------------------------------------------------------------------

    def submit(self, batch: TokenBatch) -> Flight | _Planned:
        try:
            began_s = self._clock()
            with torch.inference_mode():
                tails = self._tails(batch.rows)
                planned = self._plan(batch, self._propose(batch.rows, tails), tails, began_s)
                if self.peers is not None:
                    self.peers.tell(planned.step)
                if self._computes_late:
                    self._told.append(planned)
                    return planned
                return self._compute(planned)
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed: {error}") from error

    def collect(self, handle: Flight | _Planned) -> TokenOutput:
        if isinstance(handle, _Planned):
            assert self._told.popleft() is handle, "steps are collected in order"
            with torch.inference_mode():
                handle = self._compute(handle)
        if handle.done is not None:
            try:
                handle.done.synchronize()
            except (torch.AcceleratorError, RuntimeError) as error:
                raise DeviceFault(f"the device failed: {error}") from error
        output = land(handle)
        now = self._clock()
        output.seconds, self._collected_s = now - max(handle.began_s, self._collected_s), now
        output.is_typical = handle.is_typical
        return output

    def release(self, job_id: str) -> None:
        self._sampler.forget(job_id)
        if self._proposer is not None:
            self._proposer.release(job_id)

    def warm_up(self) -> None:
        """Compute once what is slow the first time, and note what the canary must answer from now on."""
        with torch.inference_mode():
            for graphs in self._all_graphs:  # before the canary wants a small one: the largest makes room for all
                graphs.warm_up()
            self._sampler.warm_up(self._rejects)
        self._canary_logits = self._canary()
        if not self._canary_logits.isfinite().all():
            raise DeviceFault("the model's very first logits are not finite; its weights or its dtype are unfit")

    def capture_next(self) -> bool:
        """Idle work: capture one more decode graph, False when none is left. Without memory for it steps do without."""
        try:
            with torch.inference_mode():
                return any(graphs.capture_next() for graphs in self._all_graphs)
        except torch.OutOfMemoryError:
            log.warning("decode graphs end: no device memory is left for more")
            return False
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed: {error}") from error

    def check(self) -> None:
        """Compute the canary again. Rounding may differ with the load of the device, nothing else may."""
        assert self._canary_logits is not None, "warm_up has not run"
        try:
            logits = self._canary()
        except RuntimeError as error:
            raise DeviceFault(f"the canary failed: {error}") from error
        scale = float(self._canary_logits.abs().max())
        if not torch.allclose(logits, self._canary_logits, rtol=0.0, atol=0.05 * scale):
            raise DeviceFault("the canary's logits are not what they were at the start; the device computes wrongly")

    # -- one step --------------------------------------------------------------------------------------------------

    def _tails(self, rows: list[Row]) -> Tails | None:
        if not self.runs_ahead or not any(
            row.token_ids[-1] == PENDING and (row.num_drafts or row.num_in_doubt) for row in rows
        ):
            return None
        assert self._frontier is not None
        return self._frontier.tails(rows)

    def _propose(self, rows: list[Row], tails: Tails | None) -> Proposed:
        if self._proposer is None or not any(row.num_drafts for row in rows):
            return Proposed()
        return self._proposer.propose(rows, self._sampler, tails)

    def _plan(self, batch: TokenBatch, proposed: Proposed, tails: Tails | None, began_s: float) -> _Planned:
        """Lay the rows out flat."""
        rows = batch.rows
        ids: list[int] = []
        positions: list[int] = []
        num_new: list[int] = []
        last: list[int] = []
        last_of_beams: list[int] = []
        scored: list[tuple[int, int]] = []
        for row in rows:
            new, start = row.token_ids + row.drafts if row.drafts else row.token_ids, row.start
            if row.scores_prompt:
                scored += slices_of(row, len(ids), self.model.spec.vocab_size)
            if len(new) == 1:
                ids.append(new[0])
                positions.append(start)
            else:
                ids += new
                positions += range(start, start + len(new))
            num_new.append(len(new))
            if row.num_candidates:
                last_of_beams += range(len(ids) - row.samples, len(ids))
            elif row.samples:
                last += range(len(ids) - 1 - len(row.drafts), len(ids))
        last += last_of_beams
        pending, sources = self._pending(ids, rows) if PENDING in ids else ([], [])
        behind_S = None if tails is None else tails.behind_S
        layout = TokenLayout(num_new, [row.start for row in rows], [row.block_table for row in rows], behind_S)
        wants_all = len(last) == len(ids) and not last_of_beams
        step = Step(ids, positions, layout, last, wants_all, scored, batch.copies, pending)
        return _Planned(rows, step, proposed, tails, sources, began_s, _draws(rows))

    def _compute(self, planned: _Planned) -> Flight:
        self._compute_model(planned)
        assert planned.computed is not None
        flight = self._choose(planned, *planned.computed)
        flight.began_s, flight.is_typical = planned.began_s, planned.proposed.is_typical
        self._last = flight
        return flight

    def _compute_model(self, planned: _Planned) -> None:
        """What all ranks do together, in the same order; nothing when it is done already."""
        if planned.computed is not None:
            return
        if self.peers is None:
            planned.computed = self._logits(planned)
        else:
            with self.peers.in_step():
                planned.computed = self._logits(planned)

    def _logits(self, planned: _Planned) -> tuple[torch.Tensor, list[PromptScores], torch.Tensor | None]:
        step, staging, num_tokens = planned.step, self.staging, len(planned.step.token_ids)
        graphs = self._graphs if self._graphs is not None and self._graphs.covers(step.layout) else None
        if graphs is not None:
            inputs = graphs.put(step.token_ids, step.positions, step.layout)
        else:
            inputs = StepInputs.put(step.token_ids, step.positions, step.layout, self._attention, staging)
        last_R = slice(num_tokens) if step.wants_all else staging.put(step.wanted, torch.int64)
        pending = [staging.put(places, torch.int64) for places in (step.pending, planned.sources) if places]
        copies = [staging.put(blocks, torch.int64) for blocks in zip(*step.copies)]
        if planned.draws:
            proposals = planned.proposed.in_place(planned.rows) if self._rejects else None
            planned.sampling = self._sampler.plan(planned.draws, staging, proposals=proposals)
        if self.runs_ahead and any(row.num_drafts or row.num_in_doubt for row in planned.rows):
            planned.speculative = SpeculativeStep(planned.rows, planned.proposed, step.layout.behind, staging)
        staging.send()
        if copies:
            self._attention.copy_blocks(self.kv_cache, *copies)
        ids_T = inputs.token_ids_T
        if pending:
            assert self._frontier is not None
            to_P, of_P = pending
            ids_P = self._frontier.newest_R[of_P]
            if self.peers is not None:
                self.peers.share(ids_P)
            ids_T[to_P] = ids_P
        if planned.speculative is not None:
            planned.speculative.fill_(ids_T, inputs.positions_T)
        if graphs is not None:
            hidden_TD = graphs.forward(inputs, step.layout)
        else:
            context = StepContext(self._attention, inputs.plan, self.kv_cache)
            hidden_TD = self.model.forward(ids_T, inputs.positions_T, context)
        prompts = score_prompts(planned.rows, step, hidden_TD, self.model) if step.scored else []
        hidden_RD = hidden_TD[last_R]
        inputs_R = ids_T[last_R] if planned.sampling is not None and planned.sampling.needs_inputs else None
        return self.model.logits(hidden_RD) if step.wanted else hidden_RD, prompts, inputs_R

    def _choose(
        self,
        planned: _Planned,
        logits_RV: torch.Tensor,
        prompts: list[PromptScores],
        inputs_R: torch.Tensor | None,
    ) -> Flight:
        """Draw tokens, then find candidates for beams: so come the positions that want logits."""
        rows, draws = planned.rows, planned.draws
        beams = [row for row in rows if row.samples and row.num_candidates]
        num_draws = len(draws)
        if planned.sampling is not None:
            if planned.step.pending:
                self._reveal(draws)
            inputs_R = None if inputs_R is None else inputs_R[:num_draws]
            behind_R = None if planned.speculative is None else planned.speculative.behind_of_draws()
            sampled = self._sampler.sample(logits_RV[:num_draws], planned.sampling, inputs_R, behind_R)
        else:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            sampled = Sampled(nothing, nothing, [], None)
        if planned.speculative is None or not draws:
            self._frontier = Frontier(draws, sampled.token_ids_R)
        else:
            self._frontier = planned.speculative.frontier(sampled.token_ids_R)
        candidates = find_candidates(self._sampler, logits_RV[num_draws:], beams) if beams else None
        return take_off(rows, draws, sampled, prompts, candidates, planned.proposed.drawn, queue=self._queue)

    def _pending(self, ids: list[int], rows: list[Row]) -> tuple[list[int], list[int]]:
        """Where PENDING stands in `ids` for newest tokens, and where in the frontier these are; 0 takes its place."""
        index = {} if self._frontier is None else self._frontier.index()
        to, of, at = [], [], -1
        for row in rows:
            at += len(row.token_ids)
            if row.token_ids[-1] == PENDING:
                to.append(at)
                of.append(index[row.job.id])
            at += len(row.drafts)
        ids[:] = [0 if token_id == PENDING else token_id for token_id in ids]
        return to, of

    def _reveal(self, draws: list[Row]) -> None:
        """Tell constrained rows what their PENDING token is. It waits for the step before; this one's forward is queued
        by now, so the device computes while the host makes the masks."""
        waiting = [row for row in draws if row.token_ids[-1] == PENDING and row.job.matcher is not None]
        if not waiting:
            return
        assert self._last is not None
        if self._last.done is not None:
            self._last.done.synchronize()
        known = dict(zip((row.job.id for row in self._last.draws), self._last.token_ids_R.tolist()))
        for row in waiting:
            row.newest = known[row.job.id]

    @torch.inference_mode()
    def _canary(self) -> torch.Tensor:
        """Logits of a fixed prompt in the runner's own block, then of its last token once more as a decode that reads
        the cache; on the host."""
        for planned in self._told:  # in order
            self._compute_model(planned)
        num_tokens = min(_CANARY_TOKENS, self._block_size)
        ids = [1 + i % (self.model.spec.vocab_size - 1) for i in range(num_tokens)]
        return torch.cat([self._canary_step(ids, 0), self._canary_step(ids[-1:], num_tokens - 1)])

    def _canary_step(self, ids: list[int], start: int) -> torch.Tensor:
        layout = TokenLayout([len(ids)], [start], [self._own_table])
        wanted = list(range(len(ids)))
        step = Step(ids, [start + i for i in wanted], layout, wanted, wants_all=True)
        planned = _Planned([], step, Proposed(), None, [], 0.0, [])
        if self.peers is not None:
            self.peers.tell(planned.step)
        self._compute_model(planned)
        assert planned.computed is not None
        return planned.computed[0].cpu()


def _draws(rows: list[Row]) -> list[Row]:
    """One entry per token that the step samples, in order."""
    if any(row.drafts for row in rows):
        drawing = (row for row in rows if row.samples and not row.num_candidates)
        return [row.after(i) for row in drawing for i in range(len(row.drafts) + 1)]
    return [row for row in rows if row.samples and not row.num_candidates]
