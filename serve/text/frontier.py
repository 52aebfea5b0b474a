"""Where sequences stand on the device, a step before the host knows: the newest token of each, and how far it is.

The host lays a step out as if all drafts in flight held. The step before says on the device what became of them, so the
next one can be queued at once: its unknown tokens are read from there, and every position is moved back by as many
drafts as were rejected. Nothing here is read by the host.

    laid out by the host      | computed | drafts in flight, all of them | newest, drafts ...
    what is true              | computed | those that hold | newest, drafts ...
                                                           ^ `behind` positions earlier

Legend: S rows of a step, R rows that draw tokens, T tokens of the step, D drafts that only the device knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.staging import Staging
from serve.text.sequence import PENDING, Row
from serve.text.speculation.proposer import Proposed, Tails
from serve.transfer import to_device


@dataclass(frozen=True, slots=True)
class Frontier:
    """What a step leaves behind, by row that drew."""

    rows: list[Row]
    newest_R: torch.Tensor
    before_R: torch.Tensor | None = None
    """The token before the newest one; None after a step without drafts."""
    num_computed_R: torch.Tensor | None = None
    """None: as many as the host takes for granted."""

    def index(self) -> dict[str, int]:
        """Job id → R."""
        return {row.job.id: i for i, row in enumerate(self.rows)}

    def tails(self, rows: list[Row]) -> Tails:
        """For the rows of the next step. Costs a copy to the device."""
        index = self.index()
        at = [index[row.job.id] if row.token_ids[-1] == PENDING else 0 for row in rows]
        starts, are_in_doubt = [row.start for row in rows], [int(row.num_in_doubt > 0) for row in rows]
        at_S, start_S, is_in_doubt_S = to_device([at, starts, are_in_doubt], self.newest_R.device)
        behind_S = None
        if any(are_in_doubt):
            assert self.num_computed_R is not None
            behind_S = ((start_S - self.num_computed_R[at_S]) * is_in_doubt_S).int()
        return Tails(self.newest_R[at_S], None if self.before_R is None else self.before_R[at_S], behind_S)


class SpeculativeStep:
    """A step with drafts, or behind drafts: what it needs on the device beside what every step does."""

    def __init__(self, rows: list[Row], proposed: Proposed, behind_S: torch.Tensor | None, staging: Staging):
        """Puts its indices into `staging`; the rest of the methods come after that is sent, in their order."""
        self._rows = [row for row in rows if row.samples and not row.num_candidates]
        self._drafts = [token_ids for _, token_ids in proposed.drawn]
        newest, rows_of_tokens, at = [], [], 0
        for i, row in enumerate(rows):
            num_tokens = len(row.token_ids) + len(row.drafts)
            newest.append(at + len(row.token_ids) - 1)
            rows_of_tokens += [i] * num_tokens
            at += num_tokens
        draws = [i for i, row in enumerate(rows) if row.samples and not row.num_candidates]
        num_drafts = np.array([len(rows[i].drafts) for i in draws], np.int64)
        first = np.cumsum(num_drafts + 1) - num_drafts - 1
        ends = [rows[i].start + len(rows[i].token_ids) for i in draws]
        self._entries = staging.put(
            np.array([first, num_drafts, [newest[i] for i in draws], ends, draws], np.int64), torch.int64
        )
        self._most = int(num_drafts.max(initial=0))
        self._num_draws = int(num_drafts.sum()) + len(draws)
        place = {id(row): newest[i] + 1 for i, row in enumerate(rows)}
        places = [place[id(row)] + i for i, (drawing, _) in enumerate(proposed.drawn) for row in drawing]
        self._places_D = staging.put(places, torch.int64) if places else None
        self._behind_S = behind_S
        self._ids_T: torch.Tensor | None = None
        if behind_S is not None:
            self._rows_T = staging.put(rows_of_tokens, torch.int64)
            self._rows_of_draws = staging.put(np.repeat(np.array(draws, np.int64), num_drafts + 1), torch.int64)

    def fill_(self, ids_T: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Put the drafts in their places, and all tokens at their true positions."""
        self._ids_T = ids_T
        if self._places_D is not None:
            ids_T[self._places_D] = torch.cat(self._drafts)
        if self._behind_S is not None:
            positions_T[: len(self._rows_T)].sub_(self._behind_S[self._rows_T])

    def behind_of_draws(self) -> torch.Tensor | None:
        """By how many positions each draw lies before where the host has it."""
        return None if self._behind_S is None else self._behind_S[self._rows_of_draws].long()

    def frontier(self, drawn_R: torch.Tensor) -> Frontier:
        """Count the drafts that hold, which are those equal to the draw in their place up to the first that is not."""
        ids_T = self._ids_T
        assert ids_T is not None
        first_R, num_drafts_R, newest_R, end_R, row_R = self._entries
        offsets = torch.arange(self._most, device=drawn_R.device)
        draws_RK = (first_R[:, None] + offsets).clamp_(max=self._num_draws - 1)
        drafts_RK = (newest_R[:, None] + 1 + offsets).clamp_(max=len(ids_T) - 1)
        holds_RK = (drawn_R[draws_RK] == ids_T[drafts_RK]) & (offsets < num_drafts_R[:, None])
        num_accepted_R = holds_RK.long().cumprod(1).sum(1)
        num_computed_R = end_R + num_accepted_R
        if self._behind_S is not None:
            num_computed_R -= self._behind_S[row_R]
        return Frontier(self._rows, drawn_R[first_R + num_accepted_R], ids_T[newest_R + num_accepted_R], num_computed_R)
