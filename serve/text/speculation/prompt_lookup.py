"""Drafts without a model: what followed the last time the sequence ended like this.

The newest tokens are looked up in the sequence's own text, the longest n-gram first; what stood after its latest
occurrence is proposed. When that runs into the sequence's end the text since then repeats, as in LZ77, so a period of
any length fills any number of drafts. Answers that quote their prompt (editing, extraction, code) and loops gain, other
text costs next to nothing. Follows prompt lookup decoding (Saxena, 2023).

Every n-gram is entered once, when the token after it is known: linear in the sequence's length.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.text.sequence import Row

if TYPE_CHECKING:  # they load torch, which nothing here needs
    from serve.text.cuda_graph import DecodeGraphs
    from serve.text.sampling.sampler import TokenSampler
    from serve.text.speculation.proposer import Proposed, Tails


@dataclass(slots=True)
class _Index:
    """Where each n-gram of one sequence ended last."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    """n-gram of any length → the position after it."""
    num_entered: int = 0
    """Positions whose n-grams are entered: they end before this one."""


class PromptLookup:
    """A `Proposer` by n-grams of `least` to `most` tokens."""

    runs_ahead = False
    graphs: DecodeGraphs | None = None

    def __init__(self, least: int, most: int):
        assert 1 <= least <= most
        self._least = least
        self._most = most
        self._indices: dict[str, _Index] = {}

    def propose(self, rows: Seq[Row], sampler: TokenSampler, tails: Tails | None) -> Proposed:
        from serve.text.speculation.proposer import Proposed

        for row in rows:
            if row.num_drafts:
                index = self._indices.setdefault(row.job.id, _Index())
                row.drafts = self.continuation(row.job.token_ids, row.num_drafts, index)
        return Proposed()

    def release(self, job_id: str) -> None:
        self._indices.pop(job_id, None)

    def continuation(self, token_ids: list[int], num_tokens: int, index: _Index) -> list[int]:
        """What may follow `token_ids`: `num_tokens` tokens, or none."""
        self._enter(token_ids, index)
        end = len(token_ids)
        for size in range(min(self._most, end - 1), self._least - 1, -1):
            found = index.ends.get(tuple(token_ids[end - size :]))
            if found is not None:
                period = end - found
                return [token_ids[found + i % period] for i in range(num_tokens)]
        return []

    def _enter(self, token_ids: list[int], index: _Index) -> None:
        for end in range(max(index.num_entered, self._least), len(token_ids)):
            for size in range(self._least, min(self._most, end) + 1):
                index.ends[tuple(token_ids[end - size : end])] = end
        index.num_entered = len(token_ids)
