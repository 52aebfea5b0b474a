"""Beam search as pure arithmetic: which beams live on, which hypotheses are finished, when nothing better can come.

A search is told, step by step, the best next tokens of each live beam with their log-probabilities, and answers with
the forks that live on. It knows neither blocks nor batches. Outputs are chains of `Node`s, so a fork costs nothing and
what all outcomes have in common (`settled`) is their lowest common ancestor.

`BeamSearch` is the search of transformers 5 (`GenerationMixin._beam_search`): the `num_beams` best candidates may
finish a hypothesis, of `(1 + number of end tokens) * num_beams` kept the best that do not end live on, and hypotheses
compete by sum / length ** length_penalty. `GroupBeamSearch` is diverse beam search (Vijayakumar et al., 2018) as
transformers 4 had it (`_group_beam_search`): groups take turns, and a token costs `diversity_penalty` for every beam of
an earlier group that chose it in this step; the cost stays in the sums.

Ids and scores equal theirs because the rounding does: sums, penalties and plain scores are rounded to float32, group
scores only at the end. Three differences, each where theirs is an accident: of equal sums the earlier beam and the
smaller token id come first (torch's `topk` promises no order); a beam without a possible continuation ends instead of
going on at minus 1e9; a finished group chooses nothing, where transformers 4 pads it and counts the padding.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from serve.events import FinishReason, TokenLogprobs
from serve.request import BeamParams

Candidates = Sequence[tuple[int, float]]
"""(token id, log-probability) of one beam's next token, most likely first; float32 values."""


@dataclass(slots=True, eq=False)
class Node:
    """A token of the search and what came before it."""

    token_id: int = -1
    logprob: float = 0.0
    """With the diversity penalty, where there is one."""
    rank: int = 0
    """1: the most likely of its beam."""
    depth: int = 0
    """Number of tokens from the prompt's end to here; 0: the prompt."""
    parent: Node | None = None

    def path(self, start: int = 0) -> list[Node]:
        """The nodes from depth `start + 1` to here."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.depth > start:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def entry(self) -> TokenLogprobs:
        return TokenLogprobs(self.token_id, self.logprob, self.rank)


class Fork(NamedTuple):
    """A beam that lives on: `token_id` after the live beam number `parent`."""

    parent: int
    token_id: int


class Hypothesis(NamedTuple):
    """A finished output. `node` is its last token, the end token included."""

    score: float
    node: Node
    reason: FinishReason


class Search(Protocol):
    """One search in progress. `max_tokens` at least 1."""

    num_candidates: int
    """Wanted of every live beam; fewer when no more are possible."""

    @property
    def is_done(self) -> bool: ...

    @property
    def live(self) -> Sequence[Node]:
        """The beams to compute next, in the order of `advance`; at first one node, which stands for the prompt."""
        ...

    def advance(self, rows: Sequence[Candidates]) -> list[Fork]:
        """One step: `rows` has the candidates of each live beam. Returns the new live beams; none when done."""
        ...

    def hypotheses(self) -> list[Hypothesis]:
        """The finished ones, best first."""
        ...

    def settled(self) -> Node:
        """The last node that the best hypothesis is certain to have, whatever comes."""
        ...


def make_search(params: BeamParams, end_ids: Iterable[int], max_tokens: int) -> Search:
    kind = BeamSearch if params.num_beam_groups == 1 else GroupBeamSearch
    return kind(params, frozenset(end_ids), max_tokens)


class BeamSearch:
    """A `Search` without groups."""

    def __init__(self, params: BeamParams, end_ids: frozenset[int], max_tokens: int):
        self._params = params
        self._end_ids = end_ids
        self._max_tokens = max_tokens
        self._finished: list[Hypothesis] = []  # best first
        self._sums = [0.0]
        self.live: list[Node] = [Node()]
        self.num_candidates = max(2, 1 + len(end_ids)) * params.num_beams
        self.is_done = False

    def advance(self, rows: Sequence[Candidates]) -> list[Fork]:
        num_beams, penalty = self._params.num_beams, self._params.length_penalty
        length = self.live[0].depth + 1
        living: list[_Choice] = []
        for place, choice in enumerate(_best(rows, self._sums, self.num_candidates)):
            is_end = choice.token_id in self._end_ids
            if not is_end and length < self._max_tokens:
                living.append(choice)
            elif place < num_beams:
                score = _float32(choice.total / _float32(length**penalty))
                reason = FinishReason.STOP if is_end else FinishReason.LENGTH
                self._finished.append(Hypothesis(score, choice.after(self.live), reason))
        self._finished = sorted(self._finished, key=lambda hypothesis: -hypothesis.score)[:num_beams]
        del living[num_beams:]
        self.live = [choice.after(self.live) for choice in living]
        self._sums = [choice.total for choice in living]
        self.is_done = not living or self._can_stop(length)
        return [] if self.is_done else [Fork(choice.beam, choice.token_id) for choice in living]

    def hypotheses(self) -> list[Hypothesis]:
        return self._finished

    def settled(self) -> Node:
        return _common(itertools.chain(self.live, (best.node for best in self._finished[:1])))

    def _can_stop(self, length: int) -> bool:
        """Whether there are enough hypotheses and, by transformers' heuristics, no live beam will beat the worst."""
        params = self._params
        if len(self._finished) < params.num_beams:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0.0:
            length = self._max_tokens
        return _float32(self._sums[0] / _float32(length**params.length_penalty)) <= self._finished[-1].score


class GroupBeamSearch:
    """A `Search` in groups, each a beam search of its own that shuns what the groups before it choose."""

    def __init__(self, params: BeamParams, end_ids: frozenset[int], max_tokens: int):
        self._penalty = _float32(params.diversity_penalty)
        self._max_tokens = max_tokens
        prompt = Node()
        self._groups = [_Group(prompt, params, end_ids, max_tokens) for _ in range(params.num_beam_groups)]
        # All beams of other groups may push the best tokens of this one down, each a different one.
        self.num_candidates = self._groups[0].num_candidates + params.num_beams - self._groups[0].num_beams
        self._is_first = True

    @property
    def is_done(self) -> bool:
        return all(group.is_done for group in self._groups)

    @property
    def live(self) -> list[Node]:
        groups = self._groups[:1] if self._is_first else self._groups  # at first all have the same prompt
        return [node for group in groups for node in group.live]

    def advance(self, rows: Sequence[Candidates]) -> list[Fork]:
        chosen: Counter[int] = Counter()
        forks: list[Fork] = []
        start = 0
        for group in self._groups:
            if group.is_done:
                continue
            stop = start + len(group.live)
            choices = group.advance([self._penalise(row, chosen) for row in rows[start:stop]])
            chosen.update(choice.token_id for choice in choices)
            if not group.is_done:
                forks += [Fork(start + choice.beam, choice.token_id) for choice in choices]
            start = 0 if self._is_first else stop
        self._is_first = False
        return forks

    def hypotheses(self) -> list[Hypothesis]:
        every = sorted((h for group in self._groups for h in group.finished), key=lambda hypothesis: hypothesis.score)
        return [Hypothesis(_float32(h.score), h.node, h.reason) for h in reversed(every)]  # of equals the last first

    def settled(self) -> Node:
        return _common(itertools.chain(self.live, (best.node for best in self.hypotheses()[:1])))

    def _penalise(self, row: Candidates, chosen: Counter[int]) -> Candidates:
        return [
            (token_id, _float32(logprob - _float32(self._penalty * chosen[token_id]))) if token_id in chosen
            else (token_id, logprob)
            for token_id, logprob in row
        ]  # fmt: skip


class _Group:
    """One group, by the rules of transformers 4's `BeamSearchScorer` and `BeamHypotheses`."""

    def __init__(self, prompt: Node, params: BeamParams, end_ids: frozenset[int], max_tokens: int):
        self._params = params
        self._end_ids = end_ids
        self._max_tokens = max_tokens
        self.num_beams = params.num_beams // params.num_beam_groups
        self.num_candidates = max(2, 1 + len(end_ids)) * self.num_beams
        self.live = [prompt]
        self.finished: list[Hypothesis] = []  # in order of finishing; scores are not rounded
        self.is_done = False
        self._sums = [0.0]

    def advance(self, rows: Sequence[Candidates]) -> list[_Choice]:
        """One step; what its beams have chosen, also when the group is done with that."""
        length = self.live[0].depth + 1
        best = _best(rows, self._sums, self.num_candidates)
        living: list[_Choice] = []
        for place, choice in enumerate(best):
            if choice.token_id not in self._end_ids:
                living.append(choice)
            elif place < self.num_beams:
                self._finish(choice.after(self.live), choice.total, FinishReason.STOP)
            if len(living) == self.num_beams:
                break
        self.live, self._sums = [choice.after(self.live) for choice in living], [choice.total for choice in living]
        self.is_done = not living or self._can_stop(length, best[0].total)
        if length == self._max_tokens and not self.is_done:
            for node, total in zip(self.live, self._sums):
                self._finish(node, total, FinishReason.LENGTH)
            self.is_done = True
        if self.is_done:
            self.live = []
        return living

    def _finish(self, node: Node, total: float, reason: FinishReason) -> None:
        """Keep the best `num_beams`; of equal ones the newcomer stays out, and the first to come goes first."""
        score = total / node.depth**self._params.length_penalty
        if len(self.finished) < self.num_beams or score > self._worst:
            self.finished.append(Hypothesis(score, node, reason))
            if len(self.finished) > self.num_beams:
                self.finished.remove(min(self.finished, key=lambda hypothesis: hypothesis.score))

    @property
    def _worst(self) -> float:
        return min(hypothesis.score for hypothesis in self.finished)

    def _can_stop(self, length: int, best_total: float) -> bool:
        params = self._params
        if len(self.finished) < self.num_beams:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0.0:
            length = self._max_tokens
        return self._worst >= best_total / length**params.length_penalty


class _Choice(NamedTuple):
    """A candidate among those of all live beams."""

    total: float
    """Sum of log-probabilities from the prompt's end."""
    beam: int
    token_id: int
    logprob: float
    rank: int

    def after(self, live: Sequence[Node]) -> Node:
        parent = live[self.beam]
        return Node(self.token_id, self.logprob, self.rank, parent.depth + 1, parent)


def _best(rows: Sequence[Candidates], sums: Sequence[float], num: int) -> list[_Choice]:
    """The `num` likeliest of all beams' candidates; those that cannot be (minus infinity) left out."""
    beams = [beam for beam, row in enumerate(rows) for _ in row]
    token_ids = [token_id for row in rows for token_id, _ in row]
    ranks = [rank for row in rows for rank in range(1, len(row) + 1)]
    logprobs_C = np.array([logprob for row in rows for _, logprob in row], dtype=np.float32)
    totals_C = logprobs_C + np.array(sums, dtype=np.float32)[beams]
    order = np.lexsort((np.array(token_ids), np.array(beams), -totals_C))[:num].tolist()
    totals, logprobs = totals_C.tolist(), logprobs_C.tolist()
    return [_Choice(totals[i], beams[i], token_ids[i], logprobs[i], ranks[i]) for i in order if totals[i] > -np.inf]


def _common(nodes: Iterable[Node]) -> Node:
    """The lowest common ancestor: the deepest of the different nodes steps up until there is one."""
    different = {id(node): node for node in nodes}
    heap = [(-node.depth, key) for key, node in different.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, key = heapq.heappop(heap)
        parent = different.pop(key).parent
        assert parent is not None, "two roots in one search"
        if id(parent) not in different:
            different[id(parent)] = parent
            heapq.heappush(heap, (-parent.depth, id(parent)))
    return different[heap[0][1]]


def _float32(value: float) -> float:
    return float(np.float32(value))
