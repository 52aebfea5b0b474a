"""Beam search, slowly: what `serve/text/beams/beam.py` and the engine must find. Every beam's next log-probabilities
are asked for by its tokens, whole vocabularies are sorted, nothing is kept from step to step but lists of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from serve.events import FinishReason
from serve.request import BeamParams
from serve.text.beams.beam import Hypothesis, make_search

Model = Callable[[tuple[int, ...]], np.ndarray]
"""Output so far → float32 log-probabilities of all next tokens."""


class Found(NamedTuple):
    """A hypothesis as plain values; the end token, if one ended it, is the last of `tokens`."""

    tokens: tuple[int, ...]
    score: float
    reason: FinishReason

    @classmethod
    def of(cls, hypothesis: Hypothesis) -> Found:
        tokens = tuple(node.token_id for node in hypothesis.node.path())
        return cls(tokens, hypothesis.score, hypothesis.reason)


def frozen_tokens(case: dict, found: list[Found]) -> list[list[int]]:
    """As `group_beams.json` has them: whichever end token ended one, the first of `end_ids` stands there."""
    ends = [case["end_ids"][0] if h.reason is FinishReason.STOP else h.tokens[-1] for h in found]
    return [[*hypothesis.tokens[:-1], end] for hypothesis, end in zip(found, ends)]


def searched(model: Model, params: BeamParams, end_ids: Collection[int], max_tokens: int) -> list[Found]:
    """What our search finds, told the candidates it asks for."""
    search = make_search(params, end_ids, max_tokens)
    outputs: list[tuple[int, ...]] = [()]
    while not search.is_done:
        rows = []
        for output in outputs:
            logprobs = model(output)
            best = np.argsort(-logprobs, kind="stable")[: search.num_candidates].tolist()
            rows.append([(token_id, float(logprobs[token_id])) for token_id in best])
        forks = search.advance(rows)
        outputs = [(*outputs[fork.parent], fork.token_id) for fork in forks]
    return [Found.of(hypothesis) for hypothesis in search.hypotheses()]


def plain_oracle(model: Model, params: BeamParams, end_ids: Collection[int], max_tokens: int) -> list[Found]:
    """Beam search by its definition: all continuations of all beams, best first."""
    width, alpha = params.num_beams, params.length_penalty
    beams: list[tuple[tuple[int, ...], np.float32]] = [((), np.float32(0))]
    finished: list[Found] = []
    for length in range(1, max_tokens + 1):
        everything = [
            ((*tokens, token_id), total + logprob)
            for tokens, total in beams
            for token_id, logprob in enumerate(model(tokens))
            if np.isfinite(logprob)
        ]
        everything.sort(key=lambda entry: -entry[1])
        everything = everything[: width * max(2, 1 + len(end_ids))]
        for tokens, total in everything[:width]:
            if tokens[-1] in end_ids or length == max_tokens:
                reason = FinishReason.STOP if tokens[-1] in end_ids else FinishReason.LENGTH
                finished.append(Found(tokens, float(total / np.float32(length**alpha)), reason))
        finished = sorted(finished, key=lambda found: -found.score)[:width]
        beams = [entry for entry in everything if entry[0][-1] not in end_ids][:width]
        if not beams:
            break
        hope = -np.inf if params.early_stopping is True else _hope(params, beams[0][1], length, max_tokens)
        if len(finished) == width and finished[-1].score >= hope:
            break
    return finished


def group_oracle(model: Model, params: BeamParams, end_ids: Collection[int], max_tokens: int) -> list[Found]:
    """Diverse beam search as algorithm 1 of Vijayakumar et al. (2018) has it, with Hamming diversity: at every time
    step the groups take turns; the log-probabilities of group g are less by the penalty times the number of beams
    of groups 1 .. g-1 that have just chosen the token; then one step of beam search on these.

    What the paper leaves open is transformers 4's: when a group ends, and which hypotheses it keeps.
    """
    size = params.num_beams // params.num_beam_groups
    beams = [[((), np.float32(0))] for _ in range(params.num_beam_groups)]
    kept: list[list[Found]] = [[] for _ in range(params.num_beam_groups)]
    for length in range(1, max_tokens + 1):
        chosen = None
        for g in range(params.num_beam_groups):
            if not beams[g]:
                continue
            everything = []
            for tokens, total in beams[g]:
                logprobs = model(tokens)
                if chosen is not None:
                    logprobs = logprobs - np.float32(params.diversity_penalty) * chosen.astype(np.float32)
                everything += [((*tokens, i), total + lp) for i, lp in enumerate(logprobs) if np.isfinite(lp)]
            everything.sort(key=lambda entry: -entry[1])
            everything = everything[: size * max(2, 1 + len(end_ids))]
            living = [entry for entry in everything if entry[0][-1] not in end_ids][:size]
            ended = [entry for entry in everything[:size] if entry[0][-1] in end_ids]
            kept[g] = _keep(kept[g], ended, FinishReason.STOP, params, size)
            chosen = np.zeros(len(model(())), dtype=int) if chosen is None else chosen
            np.add.at(chosen, [tokens[-1] for tokens, _ in living], 1)
            is_full = len(kept[g]) == size
            hope = _hope(params, float(everything[0][1]), length, max_tokens) if everything else -np.inf
            if is_full and (params.early_stopping is True or min(f.score for f in kept[g]) >= hope):
                living = []
            elif length == max_tokens:
                kept[g] = _keep(kept[g], living, FinishReason.LENGTH, params, size)
            beams[g] = living
    found = sorted((f for group in kept for f in group), key=lambda f: f.score)[::-1]
    return [f._replace(score=float(np.float32(f.score))) for f in found]


def _keep(kept, new, reason, params, size):
    for tokens, total in new:
        score = float(total) / len(tokens) ** params.length_penalty
        if len(kept) == size:
            worst = min(kept, key=lambda found: found.score)
            if score <= worst.score:
                continue
            kept = [found for found in kept if found is not worst]
        kept = [*kept, Found(tokens, score, reason)]
    return kept


def _hope(params: BeamParams, total: float, length: int, max_tokens: int) -> float:
    """The score that transformers' heuristics still expect of the best beam."""
    if params.early_stopping == "never" and params.length_penalty > 0:
        length = max_tokens
    return total / type(total)(length**params.length_penalty)
