"""Whose turn it is where a model is computed in stages: a batch's even share of the running decodes.

With as many batches in flight as there are stages, every decode is in one of them. A batch that took all who are ready
would leave nothing for the next, and stages would idle behind it for good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from serve.text.sequence import Sequence


def in_turn(running: Iterable[Sequence], plan: Mapping[Sequence, int], num_stages: int) -> Iterable[Sequence]:
    """Who may be in the next batch, as things stand now. With one stage everybody, in order; with several the prefills,
    then decodes with nothing in flight, who has waited longest first, until `plan`, which the caller fills meanwhile,
    has this batch's share."""
    return list(running) if num_stages == 1 else _shared(list(running), plan, num_stages)


def _shared(running: list[Sequence], plan: Mapping[Sequence, int], num_stages: int) -> Iterator[Sequence]:
    decodes = []
    for seq in running:
        if seq.num_wanted > seq.num_seats:
            yield seq
        else:
            decodes.append(seq)
    left = -(-sum(seq.num_seats for seq in decodes) // num_stages)
    for seq in sorted(decodes, key=lambda seq: max(part.last_step for part in seq.holders)):
        if left <= 0:
            break
        if not seq.num_pending:
            yield seq
            left -= plan.get(seq, 0)
