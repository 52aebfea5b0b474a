"""Which replica gets a request: the one that has its prefix cached, unless it is much busier than the others.

Prefix affinity remembers, for the leading blocks of recent prompts, which replica computed them last. It is a guess
about the replica's cache, made from what this gateway sent; a wrong guess costs a recomputation and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve.backend import Load
from serve.request import Request, TextRequest

BLOCK_TOKENS = 64
MAX_BLOCKS = 64
"""Of one prompt; what follows is rarely shared."""
MAX_REMEMBERED = 1 << 16
"""Blocks, about 10 MB."""
MAX_EXCESS = 4
"""Requests by which a replica with the prefix may be busier than twice the least busy one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the request."""

    replica_id: str
    load: Load
    num_open: int
    """Streams this gateway has open there: fresher than the reported load."""

    @property
    def busy(self) -> int:
        return max(self.load.running + self.load.waiting, self.num_open)


class Router:
    """Ranks replicas. One per gateway."""

    def __init__(self, *, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._holder: OrderedDict[int, str] = OrderedDict()
        """Chained hash of leading blocks → replica, least recently used first."""
        self._turn = 0

    def rank(self, request: Request, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Best first. Equal ones take turns."""
        if len(candidates) == 1:
            return list(candidates)
        self._turn += 1
        turned = [candidates[(self._turn + i) % len(candidates)] for i in range(len(candidates))]
        ranked = sorted(turned, key=lambda candidate: (candidate.busy, candidate.load.tokens_waiting))
        holder = self._find(request)
        limit = 2 * ranked[0].busy + MAX_EXCESS
        return sorted(ranked, key=lambda candidate: candidate.replica_id != holder or candidate.busy > limit)

    def record(self, request: Request, replica_id: str) -> None:
        """`replica_id` has accepted the request and will hold its prefix."""
        for block in _chain(request):
            self._holder[block] = replica_id
            self._holder.move_to_end(block)
        while len(self._holder) > self._max_remembered:
            self._holder.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and its cache with it."""
        self._holder = OrderedDict(item for item in self._holder.items() if item[1] != replica_id)

    def _find(self, request: Request) -> str | None:
        """The replica that last computed the longest known prefix."""
        holder = None
        for block in _chain(request):
            found = self._holder.get(block)
            if found is None:
                break
            holder = found
        return holder


def _chain(request: Request) -> Iterator[int]:
    """Chained hashes of the prompt's full leading blocks. Salted like the cache: other tenants share nothing.

    Only text leaves something behind that a later request can use."""
    if not isinstance(request, TextRequest):
        return
    ids = request.prompt_token_ids
    parent = hash((request.model, request.cache_salt))
    for start in range(0, min(len(ids), MAX_BLOCKS * BLOCK_TOKENS) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = hash((parent, ids[start : start + BLOCK_TOKENS]))
        yield parent
