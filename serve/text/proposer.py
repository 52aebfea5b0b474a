"""What proposes draft tokens, and what the verifier is told about them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch

from serve.text.sampler import Proposal, TokenSampler
from serve.text.sequence import Row


@dataclass(slots=True)
class Proposed:
    """How the drafts of a step came about; the tokens themselves are in the rows."""

    scores: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Job id → the scores each of its drafts was drawn from, [vocabulary]. Missing: the proposer was certain."""
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


class Proposer(Protocol):
    """Continues sequences cheaply. Keeps what it likes between steps: no output depends on how good its drafts are."""

    def propose(self, rows: Seq[Row], sampler: TokenSampler) -> Proposed:
        """Fill `drafts` of the rows that want some: at most `num_drafts`, fewer where it knows nothing."""
        ...

    def release(self, job_id: str) -> None:
        """The job has ended."""
        ...
