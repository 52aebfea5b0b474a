"""The sampler on CUDA: what `sampler.py` defines, by the kernels of `kernels.py`.

A step sends four numbers for each row, in its staging buffer; what a request asks has been in tables on the device
since its first step (`jobs.py`), and what depends on tokens or positions that the host does not know yet is
worked out there. Only the masks of grammars are made late, when the forward is queued and the newest tokens are known:
a step with such rows has a second copy. A batch of plain greedy rows is one argmax.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch

from models.staging import Staging
from serve.request import SamplingParams
from serve.text.sampling.gumbel import Stream
from serve.text.sampling.jobs import SamplerJobs
from serve.text.sampling.launcher import DevicePlan, Launcher, Proposed
from serve.text.sampling.logprobs import score
from serve.text.sampling.sampler import Proposal, Sampled, Sampler, greedy, scored_rows
from serve.text.sampling.token_mask import packed_masks
from serve.text.sequence import Row, Sequence
from serve.transfer import copy_to_device


class _Words(NamedTuple):
    """Of draws, in the order of `words.py`."""

    slots: list[int]
    positions: list[int]
    counts: list[int]
    scores: list[int]


class DeviceSampler:
    """A `TokenSampler`."""

    def __init__(self, vocab_size: int, eos_token_ids: Seq[int], device: torch.device):
        self._reference = Sampler(vocab_size, eos_token_ids, device)
        self._vocab_size = vocab_size
        self._device = device
        self._jobs = SamplerJobs(vocab_size, device)
        self._launcher = Launcher(vocab_size, self._jobs, device)

    def plan(
        self,
        rows: Seq[Row],
        staging: Staging,
        *,
        stream: Stream = Stream.TARGET,
        proposals: Seq[Proposal | None] | None = None,
    ) -> DevicePlan:
        recipes = [self._reference.recipe(row.job) for row in rows]
        plan = DevicePlan(rows, stream, *scored_rows(recipes))
        if plan.scored:
            plan.scored_at = staging.put(plan.scored, torch.int64)
        words = _Words([-1] * len(rows), [-1] * len(rows), [-1] * len(rows), [-1] * len(rows))
        penalised: list[int] = []
        for i, (row, recipe) in enumerate(zip(rows, recipes)):
            num_output = row.sample_position - row.job.num_prompt
            if recipe.is_plain_at(num_output):
                continue
            known = self._jobs.find(row.job, recipe)
            if known.contents:
                plan.writes.append(self._jobs.stage(known, staging))
            words.slots[i], words.positions[i] = known.slot, row.sample_position
            if known.is_filtered:
                plan.has_filtered = True
            elif not known.is_greedy:
                plan.has_unfiltered = True
            if known.changes_scores or num_output < recipe.params.min_tokens:
                words.scores[i] = plan.num_scores
                plan.num_scores += 1
                plan.has_grammars |= row.job.matcher is not None
                if known.history is not None:
                    words.counts[i] = len(penalised)
                    penalised.append(i)
                    plan.num_seen = max(plan.num_seen, row.sample_position)
        if not (plan.has_filtered or plan.has_unfiltered or plan.num_scores):
            return plan  # all rows are plain
        plan.draws = staging.put(np.array(words, np.int32), torch.int32)
        if penalised:
            plan.penalised = staging.put(penalised, torch.int32)
        if proposals is not None and any(proposals):
            plan.proposed = _stage(proposals, staging)
        return plan

    def sample(
        self,
        logits_RV: torch.Tensor,
        plan: DevicePlan,
        inputs_R: torch.Tensor | None = None,
        behind_R: torch.Tensor | None = None,
        *,
        keeps_scores: bool = False,
    ) -> Sampled:
        for writes in plan.writes:
            writes.apply()
        processed_RV = None
        if plan.draws is None:
            token_ids_R, best_R = greedy(logits_RV)
            processed_RV = logits_RV if keeps_scores else None
        else:
            if keeps_scores:
                processed_RV = torch.empty(logits_RV.shape, dtype=torch.float32, device=self._device)
            masks = self._masks(plan.rows) if plan.has_grammars else None
            token_ids_R, best_R = self._launcher.run(logits_RV, plan, masks, inputs_R, behind_R, processed_RV)
        scores = None
        if plan.scored_at is not None:
            at = plan.scored_at
            scores = score(logits_RV[at].float(), token_ids_R[at], plan.num_top)
        return Sampled(token_ids_R, best_R, plan.scored, scores, processed_RV)

    def penalised(self, scores_RV: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        return self._reference.penalised(scores_RV, rows)

    def forget(self, job_id: str) -> None:
        self._reference.forget(job_id)
        self._jobs.forget(job_id)

    def warm_up(self, rejects: bool) -> None:
        asked = [SamplingParams(max_tokens=1, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=1.0)]
        asked.append(SamplingParams(max_tokens=1))
        jobs = [Sequence(id=f"warm-up {i}", token_ids=[0], num_prompt=1, sampling=p) for i, p in enumerate(asked)]
        rows = [Row(job, 0, [0], 0, array("i"), samples=True, sample_position=1) for job in jobs]
        logits_RV = torch.zeros(len(rows), self._vocab_size, device=self._device)
        proposals = [Proposal(0, logits_RV[0]), Proposal(0, None)] if rejects else None
        staging = Staging(self._device, 1 << 16)
        plan = self.plan(rows, staging, proposals=proposals)
        staging.send()
        self.sample(logits_RV, plan, torch.zeros(len(rows), dtype=torch.int64, device=self._device))
        for job in jobs:
            self.forget(job.id)

    def _masks(self, rows: Seq[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits of the tokens that may come next, and of each row which of these rows it is, or -1; by one copy."""
        at, packed = packed_masks(rows)
        mask_of_R = np.full(-(-len(rows) // 4) * 4, -1, np.int32)  # what follows begins where 16 bytes do
        mask_of_R[at] = np.arange(len(at), dtype=np.int32)
        together = np.concatenate([mask_of_R.view(np.uint8), packed.reshape(-1)])
        sent = copy_to_device(torch.from_numpy(together), self._device)
        return sent[mask_of_R.nbytes :].view(packed.shape), sent[: mask_of_R.nbytes].view(torch.int32)


def _stage(proposals: Seq[Proposal | None], staging: Staging) -> Proposed:
    scores = [p.scores_V for p in proposals if p is not None and p.scores_V is not None]
    has_scores = np.array([p is not None and p.scores_V is not None for p in proposals])
    return Proposed(
        staging.put([-1 if p is None else p.token_id for p in proposals], torch.int64),
        staging.put(np.where(has_scores, np.cumsum(has_scores) - 1, -1), torch.int32),
        scores,
    )
