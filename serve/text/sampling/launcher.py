"""One step's launches of the sampler's kernels: which of them its rows want, and the memory between them.

    kernel   when                                    bytes of R rows, beside a few per block
    note     penalties                               -
    count    penalties (with a fill)                 4 V a penalised row, and its history
    shape    always                                  read the logits; changed scores are written once
    choose   min-p, top-k, top-p                     the groups that matter: 16 KB of maxima, 128 a group
    weigh    drafts that had alternatives            their scores, twice
    draw     unfiltered rows, drafts to decide on    read the logits or scores again, and hashed ids
    finish   always                                  -

So greedy and filtered rows take one pass over their logits in two or three launches, unfiltered ones two in three.

Legend: R rows, V vocabulary, B blocks, G groups, P penalised rows, M masks.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
import triton

from serve.text.sampling import kernels
from serve.text.sampling.gumbel import GumbelNoise, Stream
from serve.text.sampling.jobs import SamplerJobs, Writes
from serve.text.sampling.threshold import choose
from serve.text.sequence import Row

BLOCK = 4096
"""Tokens of a program of `shape` and `draw`."""
GROUP = 32
"""Tokens that share a maximum: 128 bytes of float32."""
LISTED = 128
"""Groups that `choose` looks at together."""
LANES = 1024
"""Tokens of a program of `count`, draws of one of `note`."""


@dataclass(slots=True)
class Proposed:
    """Drafts to be decided on, on the device."""

    token_ids_R: torch.Tensor
    """-1: none."""
    scores_of_R: torch.Tensor
    """Which of `scores` it was drawn from; -1: there was no choice."""
    scores: list[torch.Tensor]


@dataclass(slots=True)
class DevicePlan:
    """A `SamplingPlan`. Tensors are views of the step's staging buffer."""

    rows: Seq[Row]
    stream: Stream
    scored: list[int]
    num_top: int
    """The most alternatives that a row wants with its log-probability."""
    scored_at: torch.Tensor | None = None
    draws: torch.Tensor | None = None
    """int32 [words, R] (`words.py`). None: all rows are plain."""
    num_scores: int = 0
    """Rows whose scores are not the logits."""
    penalised: torch.Tensor | None = None
    """int32 [P]: rows with penalties."""
    num_seen: int = 0
    """The most tokens that one of them counts."""
    has_filtered: bool = False
    has_unfiltered: bool = False
    """Whether rows are drawn from what a filter leaves, or from everything."""
    has_grammars: bool = False
    proposed: Proposed | None = None
    writes: list[Writes] = field(default_factory=list)
    """To be applied before anything else."""

    @property
    def needs_inputs(self) -> bool:
        return self.penalised is not None


class Launcher:
    """Launches. Holds constants only; a step's memory comes from torch's allocator."""

    def __init__(self, vocab_size: int, jobs: SamplerJobs, device: torch.device):
        self._jobs = jobs
        self._device = device
        self._vocab_size = vocab_size
        self._num_blocks = triton.cdiv(vocab_size, BLOCK)
        self._num_groups = self._num_blocks * (BLOCK // GROUP)
        self._parts = {"num_blocks": self._num_blocks, "blocks": triton.next_power_of_2(self._num_blocks)}
        self._hashed_V = GumbelNoise(vocab_size, device).hashed_V
        self._zeros_R = torch.zeros(0, dtype=torch.int64, device=device)
        self._nones_R = torch.zeros(0, dtype=torch.int32, device=device)
        self._no_masks = torch.zeros(1, 1, dtype=torch.uint8, device=device)

    def run(
        self,
        logits_RV: torch.Tensor,
        plan: DevicePlan,
        masks: tuple[torch.Tensor, torch.Tensor] | None,
        inputs_R: torch.Tensor | None,
        behind_R: torch.Tensor | None,
        processed_RV: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and largest logits. `masks`: bits of the tokens that may come next [M, bytes], and which are each
        row's, or -1. `processed_RV` is filled."""
        assert plan.draws is not None
        num_rows, jobs, new = len(plan.rows), self._jobs, plan.draws.new_empty
        if len(self._nones_R) < num_rows:
            self._zeros_R = plan.draws.new_zeros(2 * num_rows, dtype=torch.int64)
            self._nones_R = plan.draws.new_full((2 * num_rows,), -1)
        draws = plan.draws, num_rows, self._zeros_R if behind_R is None else behind_R, jobs.params.words_SW
        counts_PV = self._count(draws, plan, inputs_R)
        masks_MB, mask_of_R = masks or (self._no_masks, self._nones_R)
        maxima_RG = new((num_rows, self._num_groups), dtype=torch.float32)
        raw_RB = new((num_rows, self._num_blocks), dtype=torch.float32)
        # Rounded up, so that each begins where 16 bytes do.
        best_RB, drawn_RB, spare_RB, mass_RB = new((4, -(-raw_RB.numel() // 2) * 2), dtype=torch.int64)
        scores = new(plan.num_scores * self._vocab_size, dtype=torch.float32)
        rows = logits_RV, logits_RV.stride(0), *draws, scores, best_RB
        proposed = plan.proposed
        options = {"vocab": self._vocab_size, "has_proposals": proposed is not None, "enable_fp_fusion": False}
        kernels.shape[num_rows, self._num_blocks](
            *rows, jobs.entries.words_SW, jobs.entries.words_SW.stride(0), masks_MB, masks_MB.stride(0), mask_of_R,
            counts_PV, maxima_RG, mass_RB, raw_RB, block=BLOCK, group=GROUP, num_warps=8, **options,
        )  # fmt: skip
        decisions = self._decisions(num_rows, proposed)
        if plan.has_filtered or proposed is not None:
            choose[num_rows,](
                *rows, drawn_RB, *decisions[:3], maxima_RG, mass_RB, new((num_rows, self._num_groups)), self._hashed_V,
                plan.stream, **self._parts, num_groups=self._num_groups,
                groups=triton.next_power_of_2(self._num_groups), group=GROUP, listed=LISTED, num_warps=16, **options,
            )  # fmt: skip
        if plan.has_unfiltered or proposed is not None or processed_RV is not None:
            kernels.draw[num_rows, self._num_blocks](
                *rows, drawn_RB, *decisions, spare_RB, self._hashed_V, plan.stream,
                scores if processed_RV is None else processed_RV, block=BLOCK, **self._parts,
                keeps_scores=processed_RV is not None, num_warps=8, **options,
            )  # fmt: skip
        token_ids_R, raw_best_R = new(num_rows, dtype=torch.int64), new(num_rows, dtype=torch.float32)
        kernels.finish[num_rows,](
            *rows,
            drawn_RB,
            *decisions,
            spare_RB,
            raw_RB,
            token_ids_R,
            raw_best_R,
            **self._parts,
            num_warps=1,
            **options,
        )
        return token_ids_R, raw_best_R

    def _count(
        self,
        draws: tuple[torch.Tensor, int, torch.Tensor, torch.Tensor],
        plan: DevicePlan,
        inputs_R: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens of the penalised rows; the step's newest ones are noted before."""
        if plan.penalised is None:
            return self._nones_R
        assert inputs_R is not None, "`plan.needs_inputs` was not heeded"
        num_penalised, histories_SW = len(plan.penalised), self._jobs.histories.words_SW
        counts_PV = histories_SW.new_zeros(num_penalised, self._vocab_size)
        history = histories_SW, histories_SW.stride(0)
        kernels.note[triton.cdiv(num_penalised, LANES),](
            *draws, plan.penalised, num_penalised, *history, inputs_R, lanes=LANES
        )
        kernels.count[num_penalised, triton.cdiv(plan.num_seen, LANES)](
            *draws, plan.penalised, *history, counts_PV, vocab=self._vocab_size, lanes=LANES
        )
        return counts_PV

    def _decisions(self, num_rows: int, proposed: Proposed | None) -> tuple[torch.Tensor, ...]:
        """Thresholds and masses of the rows, their drafts, the scores these were drawn from and what they weigh."""
        thresholds_R, log_mass_R = (
            self._nones_R.new_empty(num_rows),
            self._hashed_V.new_empty(num_rows, dtype=torch.float32),
        )
        if proposed is None:
            return thresholds_R, log_mass_R, self._zeros_R, self._nones_R, log_mass_R, log_mass_R
        scores_DV = torch.stack(proposed.scores) if proposed.scores else log_mass_R
        weights_R2 = log_mass_R.new_empty(num_rows, 2)
        kernels.weigh[num_rows,](
            scores_DV, proposed.scores_of_R, weights_R2, vocab=self._vocab_size, block=BLOCK,
            num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
        return thresholds_R, log_mass_R, proposed.token_ids_R, proposed.scores_of_R, scores_DV, weights_R2
