"""A beam request in the engine: one job whose live beams are rows in the same batches as everybody else's.

The scheduler sees a `Sequence` that wants several tokens a step and takes `num_beams` seats. A `Beam` is a sequence of
its own with a block table of its own; the engine never hears of it. When every beam's candidates are in, the search
decides who lives on, and beams become forks of others' block tables: all blocks are shared by reference count, and who
next writes into a shared last block first gets a copy of it. So at most one block a beam is ever copied.

    prompt (shared)   | full blocks (shared by those who fork from the same beam) | last block, copied on write

After a preemption the beams are computed again, each from the last full block that an earlier one has in common with
it: `split` hands out positions in the order of the beams, so what a beam shares is computed before or with its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from serve.engine.interface import Update
from serve.errors import RequestFailed
from serve.events import FinishReason
from serve.text.beams.beam import Candidates, Fork, Hypothesis, Node, Search, make_search
from serve.text.kv_cache import KVCache
from serve.text.sequence import Sequence

COMPLETE = -1
"""In place of an end token, with probability 1: the grammar lets nothing follow."""


@dataclass(slots=True)
class BeamUpdate:
    """What a step gives a beam request."""

    settled: list[Node]
    """New tokens that the best hypothesis is certain to have; none where several are to be returned."""
    hypotheses: list[Hypothesis] = field(default_factory=list)
    """At the end: the best ones, as many as are to be returned and exist."""


@dataclass(slots=True, eq=False, kw_only=True)
class Beam(Sequence):
    """One live beam: prompt and output so far."""

    group: BeamGroup = field(repr=False)
    candidates: Candidates | None = None
    """Of its next token, while others' are awaited."""
    copy: tuple[int, int] | None = None
    """(from, to): a block to be copied before its next step, until that has been settled."""

    @property
    def owner(self) -> Sequence:
        return self.group

    @property
    def num_candidates(self) -> int:
        return self.group.search.num_candidates

    @property
    def num_wanted(self) -> int:
        if self.num_pending or self.candidates is not None:
            return 0
        return len(self.token_ids) - self.num_scheduled

    def take(self, candidates: Candidates | None, kv_cache: KVCache) -> Update[Sequence] | None:
        """A step of it is settled, and its candidates are found if that was the last of what is known."""
        self.copy = None
        if candidates is None:
            return None
        self.num_pending -= 1
        self.candidates = candidates
        return self.group.advance(kv_cache)

    def forget_progress(self) -> None:
        Sequence.forget_progress(self)
        self.candidates = self.copy = None


@dataclass(slots=True, eq=False, kw_only=True)
class BeamGroup(Sequence):
    """The job: its own `token_ids` are the prompt. `sampling.beams` says how to search."""

    num_returned: int
    search: Search = field(init=False, repr=False)
    beams: list[Beam] = field(default_factory=list, repr=False)
    num_delivered: int = 0
    """Tokens of the best hypothesis that were handed out."""

    def begin(self) -> None:
        """Make the search and the first beam, which is the prompt. Once, when `end_ids` are known."""
        assert self.sampling.beams is not None
        self.may_speculate = False
        if self.matcher is not None:
            self.end_ids |= self.matcher.end_ids | {COMPLETE}
        self.search = make_search(self.sampling.beams, self.end_ids, self.sampling.max_tokens)
        self.beams = [
            Beam(
                id=self.id,
                group=self,
                token_ids=list(self.token_ids),
                num_prompt=self.num_prompt,
                sampling=self.sampling,
                cache_salt=self.cache_salt,
                block_hashes=list(self.block_hashes),
                end_ids=self.end_ids,
                matcher=self.matcher,
            )
        ]

    # -- what the scheduler asks of every sequence -------------------------------------------------------------------

    @property
    def holders(self) -> list[Beam]:
        return self.beams

    @property
    def num_seats(self) -> int:
        assert self.sampling.beams is not None
        return self.sampling.beams.num_beams

    @property
    def num_known(self) -> int:
        return self.num_prompt + sum(beam.num_output for beam in self.beams)

    @property
    def num_wanted(self) -> int:
        return sum(beam.num_wanted for beam in self.beams)

    def split(self, num_new: int) -> list[tuple[Sequence, int]]:
        shares: list[tuple[Sequence, int]] = []
        for beam in self.beams:
            share = min(num_new, beam.num_wanted)
            if share:
                shares.append((beam, share))
            num_new -= share
        return shares

    def allocate(self, kv_cache: KVCache, cached: list[int], reserve: int) -> bool:
        """`cached` is looked up again for every beam, as each allocation may take what the next could have found."""
        size = kv_cache.block_size
        for i, beam in enumerate(self.beams):
            length = len(beam.token_ids)
            start = self._blocks_in_common(i, size)
            start += kv_cache.find(beam.block_hashes[: (length - 1) // size])[len(start) :]
            blocks = kv_cache.allocate(start, -(-length // size) - len(start), reserve)
            if blocks is None:
                for earlier in self.beams[:i]:
                    kv_cache.free(earlier.blocks)
                    earlier.forget_progress()
                return False
            beam.blocks, beam.num_published = blocks, len(start)
            beam.num_computed = beam.num_scheduled = len(start) * size
        self.num_computed = self.beams[0].num_computed
        return True

    def grow(self, kv_cache: KVCache) -> bool:
        size = kv_cache.block_size
        ready = [beam for beam in self.beams if beam.num_wanted == 1]
        full = [beam for beam in ready if beam.num_scheduled == len(beam.blocks) * size]
        last = Counter(beam.blocks[-1] for beam in ready if beam.num_scheduled < len(beam.blocks) * size)
        num_copies = sum(min(num, kv_cache.num_references(block) - 1) for block, num in last.items())
        if len(full) + num_copies > kv_cache.num_free:
            return False
        for beam in ready:
            if beam.num_scheduled == len(beam.blocks) * size:
                kv_cache.extend(beam.blocks)
            elif kv_cache.num_references(beam.blocks[-1]) > 1:
                source = beam.blocks[-1]
                beam.blocks = kv_cache.own_last(beam.blocks)
                beam.copy = (source, beam.blocks[-1])
        return True

    # -- the search --------------------------------------------------------------------------------------------------

    def advance(self, kv_cache: KVCache) -> Update[Sequence] | None:
        """Let the search take a step when every beam's candidates are in. Who does not live on gives its blocks back.

        When the search is done its beams keep theirs, as a finished sequence does until it is released.
        """
        rows = [beam.candidates for beam in self.beams if beam.candidates is not None]
        if len(rows) < len(self.beams):
            return None
        for beam in self.beams:
            if beam.matcher is not None and beam.matcher.failure is not None:
                error = RequestFailed(f"the output cannot go on: {beam.matcher.failure}")
                return Update(self, None, FinishReason.ERROR, error)
        while len(rows) == len(self.beams):
            forks = self.search.advance(rows)
            if self.search.is_done:
                return self._finish()
            self._fork(forks, kv_cache)
            rows = [beam.candidates for beam in self.beams if beam.candidates is not None]
        settled = self.search.settled().path(self.num_delivered) if self.num_returned == 1 else []
        self.num_delivered += len(settled)
        return Update(self, BeamUpdate(settled))

    def _fork(self, forks: list[Fork], kv_cache: KVCache) -> None:
        """The last child of a beam takes it over, the others before it get copies of its lists."""
        num_left = Counter(fork.parent for fork in forks)
        living: list[Beam] = []
        for parent, token_id in forks:
            beam = self.beams[parent]
            num_left[parent] -= 1
            if num_left[parent]:
                beam = replace(
                    beam,
                    token_ids=list(beam.token_ids),
                    blocks=kv_cache.fork(beam.blocks),
                    block_hashes=list(beam.block_hashes),
                    matcher=None if beam.matcher is None else beam.matcher.fork(),
                )
            beam.token_ids.append(token_id)
            beam.candidates = None
            if beam.matcher is not None:
                beam.matcher.accept(token_id)
                if beam.matcher.is_complete:
                    beam.candidates = [(COMPLETE, 0.0)]
            living.append(beam)
        for i, beam in enumerate(self.beams):
            if i not in num_left:
                kv_cache.free(beam.blocks)
        self.beams = living

    def _finish(self) -> Update[Sequence]:
        hypotheses = self.search.hypotheses()[: self.num_returned]
        if len(hypotheses) < self.num_returned:
            error = RequestFailed(
                f"n is {self.num_returned}, but the request lets beams find only {len(hypotheses)} outputs; lower n or "
                f"allow more (response_format, logit_bias, num_beams)"
            )
            return Update(self, None, FinishReason.ERROR, error)
        return Update(self, BeamUpdate([], hypotheses), hypotheses[0].reason)

    def _blocks_in_common(self, at: int, block_size: int) -> list[int]:
        """The most full blocks that an earlier beam has and this one needs as well. The last position is its own."""
        outputs = [beam.token_ids[self.num_prompt :] for beam in self.beams[: at + 1]]
        mine = outputs.pop()
        best: list[int] = []
        for beam, output in zip(self.beams, outputs):
            num_common = next((i for i, (a, b) in enumerate(zip(mine, output)) if a != b), min(len(mine), len(output)))
            num_blocks = min(self.num_prompt + num_common, self.num_prompt + len(mine) - 1) // block_size
            if num_blocks > len(best):
                best = list(beam.blocks[:num_blocks])
        return best
