"""Computes token batches: one model forward per step over all scheduled tokens, then one draw per sampling row.

Owns the model, the attention backend, the cache tensors and the sampler; decides nothing. A step goes

    rows → drafts → flat ids and positions → attention.plan → forward → logits where wanted → sampler → ids on the host

Rows that want drafts get them from the proposer first, as tokens on the host, which on CUDA waits for each; the decode
graphs are for one token a row, so a step with drafts runs without them.

On CPU `submit` computes and `collect` hands over. On CUDA `submit` queues everything, copies to pinned memory and an
event included, and `collect` waits for the event. A token still unknown on the host (PENDING) is read from the previous
step's output on the device, so that the next step can be queued before this one's tokens are known.

Legend: T new tokens of the step, D hidden size, R rows that sample, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.text.base import CausalLM, StepContext
from serve.engine.interface import DeviceFault
from serve.events import TokenLogprobs
from serve.text.candidates import Candidates, find_candidates
from serve.text.cuda_graph import DecodeGraphs
from serve.text.logprobs import Scores, score
from serve.text.proposer import Proposed, Proposer
from serve.text.sampler import Proposal, Sampled, Sampler, require_finite
from serve.text.sequence import PENDING, Row, TokenBatch, TokenOutput
from serve.text.speculative import until_rejected
from serve.transfer import to_device, to_host

log = logging.getLogger(__name__)

_SCORED_AT_ONCE = 1 << 24
"""Logits held at once while a prompt is scored: 64 MiB of float32."""

_CANARY_TOKENS = 4


@dataclass(slots=True)
class _PromptScores:
    """Log-probabilities of one row's prompt tokens, in slices."""

    row: int
    num_top: int
    slices: list[tuple[Scores, torch.Tensor]]
    """With the largest logit of the whole slice, which tells whether all are numbers."""


@dataclass(slots=True)
class _Flight:
    """A submitted step: results in host memory once `done` has happened."""

    rows: list[Row]
    draws: list[Row]
    token_ids_R: torch.Tensor
    best_R: torch.Tensor
    scored: list[int]
    scores: Scores | None
    prompts: list[_PromptScores]
    candidates: Candidates | None
    done: torch.cuda.Event | None
    began_s: float = 0.0
    is_typical: bool = True


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
        proposer: Proposer | None = None,
        rejects: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Allocates `num_blocks` blocks for the scheduler and one more of its own, where the canary lives.

        Decode steps of up to `max_rows_in_graph` rows run as CUDA graphs, which then need `max_model_len`. `rejects`:
        drafts are verified by rejection sampling; else draws are coupled (`speculative.py`).
        """
        self.model = model
        self.device = cache.device
        self._attention = attention
        self.kv_cache = attention.allocate(num_blocks + 1)
        self._own_block = num_blocks
        self._block_size = cache.block_size
        self._sampler = Sampler(model.spec.vocab_size, model.spec.eos_token_ids, cache.device)
        self._proposer = proposer
        self._rejects = rejects
        self._clock = clock
        self._collected_s = 0.0
        """When the last step was collected: a later one does not count the time before."""
        self._is_async = cache.device.type == "cuda"
        self._previous: tuple[list[Row], torch.Tensor] | None = None
        """Draws of the last submitted step and their token ids on the device."""
        self._last: _Flight | None = None
        """The last submitted step."""
        self._canary_logits: torch.Tensor | None = None
        self._graphs: DecodeGraphs | None = None
        if max_rows_in_graph:
            self._graphs = DecodeGraphs(
                model,
                attention,
                self.kv_cache,
                own_block=self._own_block,
                max_blocks=-(-max_model_len // cache.block_size),
                block_size=cache.block_size,
                max_rows=max_rows_in_graph,
                device=cache.device,
            )

    # -- the contract ----------------------------------------------------------------------------------------------

    def submit(self, batch: TokenBatch) -> _Flight:
        try:
            began_s = self._clock()
            with torch.inference_mode():
                self._copy(batch.copies)
                proposed = self._propose(batch.rows)
                flight = self._compute(batch.rows, proposed)
            flight.began_s, flight.is_typical = began_s, proposed.is_typical
            self._last = flight
            return flight
        except torch.AcceleratorError as error:
            raise DeviceFault(f"the device failed: {error}") from error

    def collect(self, handle: _Flight) -> TokenOutput:
        if handle.done is not None:
            try:
                handle.done.synchronize()
            except (torch.AcceleratorError, RuntimeError) as error:
                raise DeviceFault(f"the device failed: {error}") from error
        output = _output(handle)
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
        self._canary_logits = self._canary()
        if not self._canary_logits.isfinite().all():
            raise DeviceFault("the model's very first logits are not finite; its weights or its dtype are unfit")
        if self._graphs is not None:
            with torch.inference_mode():
                self._graphs.warm_up()

    def capture_next(self) -> bool:
        """Idle work: capture one more decode graph, False when none is left. Without memory for it steps do without."""
        if self._graphs is None:
            return False
        try:
            with torch.inference_mode():
                return self._graphs.capture_next()
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

    def _propose(self, rows: list[Row]) -> Proposed:
        if self._proposer is None or not any(row.num_drafts for row in rows):
            return Proposed()
        return self._proposer.propose(rows, self._sampler)

    def _compute(self, rows: list[Row], proposed: Proposed) -> _Flight:
        ids: list[int] = []
        positions: list[int] = []
        num_new: list[int] = []
        last: list[int] = []
        last_of_beams: list[int] = []
        for row in rows:
            new, start = row.token_ids + row.drafts if row.drafts else row.token_ids, row.start
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
        num_tokens = len(ids)
        last += last_of_beams
        pending = self._pending(ids, rows)

        packed = to_device(ids + positions + last, self.device)
        ids_T, positions_T, last_R = packed[:num_tokens], packed[num_tokens : 2 * num_tokens], packed[2 * num_tokens :]
        if pending is not None:
            ids_T[pending[0]] = pending[1]
        layout = TokenLayout(num_new, [row.start for row in rows], [row.block_table for row in rows])
        if self._graphs is not None and num_tokens == len(rows) and self._graphs.covers(num_tokens):
            hidden_TD = self._graphs.forward(ids_T, positions_T, layout)
        else:
            hidden_TD = self._forward(ids_T, positions_T, layout)

        prompts = [self._score_prompt(i, rows, num_new, hidden_TD) for i, row in enumerate(rows) if row.scores_prompt]
        hidden_RD = hidden_TD if len(last) == num_tokens and not last_of_beams else hidden_TD[last_R]
        pending_R = ids_T[last_R] if pending is not None else None
        return self._choose(rows, hidden_RD, pending_R, proposed, prompts)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            sources, targets = to_device(list(zip(*copies)), self.device)
            self._attention.copy_blocks(self.kv_cache, sources, targets)

    def _choose(
        self,
        rows: list[Row],
        hidden_RD: torch.Tensor,
        pending_R: torch.Tensor | None,
        proposed: Proposed,
        prompts: list[_PromptScores],
    ) -> _Flight:
        """Draw tokens, then find candidates for beams: so come the positions that want logits."""
        draws, beams = _draws(rows), [row for row in rows if row.samples and row.num_candidates]
        num_draws = len(draws)
        logits_RV = self.model.logits(hidden_RD) if draws or beams else hidden_RD
        if draws:
            proposals = _proposals(rows, proposed) if self._rejects else None
            pending_R = None if pending_R is None else pending_R[:num_draws]
            if pending_R is not None:
                self._reveal(draws)
            sampled = self._sampler.sample(logits_RV[:num_draws], draws, pending_R, proposals=proposals)
        else:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            sampled = Sampled(nothing, nothing, [], None)
        self._previous = (draws, sampled.token_ids_R)
        candidates = find_candidates(self._sampler, logits_RV[num_draws:], beams) if beams else None
        return self._take_off(rows, draws, sampled, prompts, candidates)

    def _forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        context = StepContext(self._attention, self._attention.plan(layout), self.kv_cache)
        return self.model.forward(ids_T, positions_T, context)

    def _pending(self, ids: list[int], rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where PENDING stands in `ids`, and the tokens that belong there, on the device. None: nowhere."""
        if PENDING not in ids:
            return None
        assert self._previous is not None
        previous_rows, token_ids_R = self._previous
        index = {row.job.id: i for i, row in enumerate(previous_rows)}
        to, of, at = [], [], -1
        for row in rows:
            at += len(row.token_ids) + len(row.drafts)
            if row.token_ids[-1] == PENDING:
                to.append(at)
                of.append(index[row.job.id])
                ids[at] = 0
        to_P, of_P = to_device(to + of, self.device).split(len(to))
        return to_P, token_ids_R[of_P]

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

    def _score_prompt(self, at: int, rows: list[Row], num_new: list[int], hidden_TD: torch.Tensor) -> _PromptScores:
        """The log-probability of each prompt token that follows one of this row's positions."""
        row = rows[at]
        assert row.job.prompt_logprobs is not None
        known = row.job.token_ids[row.start + 1 : min(row.start + 1 + len(row.token_ids), row.job.num_prompt)]
        first, num_top = sum(num_new[:at]), row.job.prompt_logprobs
        size = max(1, _SCORED_AT_ONCE // self.model.spec.vocab_size)
        scores = _PromptScores(at, num_top, [])
        next_ids = to_device(known, self.device)
        for start in range(0, len(known), size):
            stop = min(start + size, len(known))
            logits_RV = self.model.logits(hidden_TD[first + start : first + stop])
            scores.slices.append((score(logits_RV, next_ids[start:stop], num_top), logits_RV.amax()))
        return scores

    def _take_off(
        self,
        rows: list[Row],
        draws: list[Row],
        sampled: Sampled,
        prompts: list[_PromptScores],
        candidates: Candidates | None,
    ) -> _Flight:
        """Start the copies to the host."""
        for prompt in prompts:
            prompt.slices = [(part.to_host(), to_host(best)) for part, best in prompt.slices]
        flight = _Flight(
            rows,
            draws,
            to_host(sampled.token_ids_R),
            to_host(sampled.best_R),
            sampled.scored,
            None if sampled.scores is None else sampled.scores.to_host(),
            prompts,
            None if candidates is None else candidates.to_host(),
            torch.cuda.Event() if self._is_async else None,
        )
        if flight.done is not None:
            flight.done.record()
        return flight

    @torch.inference_mode()
    def _canary(self) -> torch.Tensor:
        """Logits of a fixed prompt in the runner's own block, on the host."""
        num_tokens = min(_CANARY_TOKENS, self._block_size)
        ids = [1 + i % (self.model.spec.vocab_size - 1) for i in range(num_tokens)]
        layout = TokenLayout([num_tokens], [0], [[self._own_block]])
        hidden_TD = self._forward(to_device(ids, self.device), to_device(range(num_tokens), self.device), layout)
        return self.model.logits(hidden_TD).cpu()


def _draws(rows: list[Row]) -> list[Row]:
    """One entry per token that the step samples, in order."""
    if any(row.drafts for row in rows):
        drawing = (row for row in rows if row.samples and not row.num_candidates)
        return [row.after(i) for row in drawing for i in range(len(row.drafts) + 1)]
    return [row for row in rows if row.samples and not row.num_candidates]


def _proposals(rows: list[Row], proposed: Proposed) -> list[Proposal | None]:
    """The draft in the place of each draw, None where there is none: the last draw of every row."""
    proposals: list[Proposal | None] = []
    for row in rows:
        if row.samples and not row.num_candidates:
            scores = proposed.scores.get(row.job.id)
            proposals += [
                Proposal(token_id, None if scores is None else scores[i]) for i, token_id in enumerate(row.drafts)
            ]
            proposals.append(None)
    return proposals


def _output(flight: _Flight) -> TokenOutput:
    rows, draws = flight.rows, flight.draws
    require_finite(flight.best_R.tolist(), draws)
    drawn = flight.token_ids_R.tolist()
    scores: dict[int, TokenLogprobs] = {}
    if flight.scores is not None:
        num_top = [draws[i].job.sampling.logprobs or 0 for i in flight.scored]
        scores = dict(zip(flight.scored, flight.scores.tolist(num_top)))
    output, at = TokenOutput([], [], [None] * len(rows)), 0
    for row in rows:
        if not row.samples or row.num_candidates:
            output.token_ids.append(())
            output.logprobs.append(None)
            continue
        num_drafts = len(row.drafts)
        sampled = until_rejected(drawn[at : at + num_drafts + 1], row.drafts) if num_drafts else (drawn[at],)
        output.token_ids.append(sampled)
        output.logprobs.append(tuple(scores[at + i] for i in range(len(sampled))) if at in scores else None)
        at += num_drafts + 1
    for prompt in flight.prompts:
        require_finite([float(best) for _, best in prompt.slices], [rows[prompt.row]] * len(prompt.slices))
        output.prompt_logprobs[prompt.row] = [
            entry for part, _ in prompt.slices for entry in part.tolist([prompt.num_top] * len(part.token_ids_R))
        ]
    if flight.candidates is not None:
        beams = (i for i, row in enumerate(rows) if row.samples and row.num_candidates)
        output.candidates = dict(zip(beams, flight.candidates.tolist()))
    return output
