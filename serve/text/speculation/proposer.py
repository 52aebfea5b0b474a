"""What proposes draft tokens, and what the verifier is told about them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch

from serve.text.cuda_graph import DecodeGraphs
from serve.text.sampling.sampler import Proposal, TokenSampler
from serve.text.sequence import Row


@dataclass(slots=True)
class Proposed:
    """How the drafts of a step came about; the tokens themselves are in the rows."""

    scores: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Job id → the scores each of its drafts was drawn from, [vocabulary]. Missing: the proposer was certain."""
    drawn: list[tuple[list[Row], torch.Tensor]] = field(default_factory=list)
    """First drafts, second drafts and so on, of so many rows, on the device: what PENDING stands for in theirs."""
    is_typical: bool = True
    """False when this took longer than the same drafts will take next time."""

    def in_place(self, rows: Seq[Row]) -> list[Proposal | None]:
        """The draft in the place of each draw, None where there is none: the last draw of every row."""
        proposals: list[Proposal | None] = []
        for row in rows:
            if row.samples and not row.num_candidates:
                scores = self.scores.get(row.job.id)
                proposals += [
                    Proposal(token_id, None if scores is None else scores[i]) for i, token_id in enumerate(row.drafts)
                ]
                proposals.append(None)
        return proposals


@dataclass(frozen=True, slots=True)
class Tails:
    """What only the device knows of the rows of a step. One entry a row, of which that about its tokens means something
    where its newest token is PENDING."""

    newest_S: torch.Tensor
    before_S: torch.Tensor | None
    """The token before the newest one. None: the step before had no drafts."""
    behind_S: torch.Tensor | None
    """By how many positions each row begins before `Row.start` (int32). None: by none."""


class Proposer(Protocol):
    """Continues sequences cheaply. Keeps what it likes between steps: no output depends on how good its drafts are."""

    runs_ahead: bool
    """Whether drafts stay on the device: then it also continues rows whose newest token, or whose drafts of the step
    before, the host does not know."""
    graphs: DecodeGraphs | None
    """Of its forwards; the runner says when to capture."""

    def propose(self, rows: Seq[Row], sampler: TokenSampler, tails: Tails | None) -> Proposed:
        """Fill `drafts` of the rows that want some: at most `num_drafts`, fewer where it knows nothing.

        `tails` is given to who runs ahead, where a row's newest token is PENDING.
        """
        ...

    def release(self, job_id: str) -> None:
        """The job has ended."""
        ...
