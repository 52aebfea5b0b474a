"""The search alone: against oracles of our own, and diverse beams against frozen answers of transformers 4.55.4."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest
import torch
from beams import Model, frozen_tokens, group_oracle, plain_oracle, searched
from group_beams import FILE, PAD, PAD_BIAS, make_model
from hypothesis import given
from hypothesis import strategies as st

from serve.events import FinishReason
from serve.request import BeamParams
from serve.text.beams.beam import make_search

FROZEN = json.loads(FILE.read_text(encoding="utf-8"))
VOCAB = 29


def table_model(seed: int) -> Model:
    """A language model without a network: log-probabilities by a hash of what came before."""

    @cache
    def model(output: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(crc32(repr(output).encode(), seed))
        logits = rng.normal(size=VOCAB) * 2
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    return model


@st.composite
def searches(draw, max_groups: int):
    """(model seed, parameters, end tokens, max_tokens)"""
    groups = draw(st.integers(2, max_groups)) if max_groups > 1 else 1
    params = BeamParams(
        num_beams=groups * draw(st.integers(1, 3)),
        num_beam_groups=groups,
        diversity_penalty=draw(st.sampled_from([0.1, 0.7, 3.0])) if groups > 1 else 0.0,
        length_penalty=draw(st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
    )
    end_ids = draw(st.sets(st.integers(0, VOCAB - 1), max_size=2))
    return draw(st.integers(0, 1000)), params, end_ids, draw(st.integers(1, 9))


@given(searches(max_groups=1))
def test_search_equals_the_oracle(case):
    seed, *rest = case
    assert searched(table_model(seed), *rest) == plain_oracle(table_model(seed), *rest)


@given(searches(max_groups=3))
def test_group_search_equals_the_oracle(case):
    seed, *rest = case
    assert searched(table_model(seed), *rest) == group_oracle(table_model(seed), *rest)


@pytest.mark.parametrize("case", FROZEN, ids=range(len(FROZEN)))
def test_group_search_equals_the_frozen_answer(case):
    model = make_model(case["seed"], case["scale"])

    @cache
    def logprobs(output: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            logprobs_V = model(torch.tensor([[*case["prompt"], *output]])).logits[0, -1].log_softmax(-1)
        logprobs_V[PAD] += PAD_BIAS
        return logprobs_V.numpy()

    names = ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
    params = BeamParams(**{name: case[name] for name in names})
    want = case["hypotheses"]
    for found in (f(logprobs, params, case["end_ids"], case["max_tokens"]) for f in (searched, group_oracle)):
        assert frozen_tokens(case, found) == [hypothesis["tokens"] for hypothesis in want]
        # fp32 sums of a dozen log-probabilities from logits that differ in their last bits: with and without a cache
        assert [h.score for h in found] == pytest.approx([h["score"] for h in want], rel=1e-5, abs=1e-5)


@given(searches(max_groups=3) | searches(max_groups=1))
def test_what_is_settled_is_what_the_best_hypothesis_begins_with(case):
    seed, params, end_ids, max_tokens = case
    model, search = table_model(seed), make_search(params, end_ids, max_tokens)
    outputs, settled = [()], [()]
    while not search.is_done:
        rows = [list(enumerate(model(output).tolist())) for output in outputs]
        rows = [sorted(row, key=lambda entry: -entry[1])[: search.num_candidates] for row in rows]
        outputs = [(*outputs[fork.parent], fork.token_id) for fork in search.advance(rows)]
        settled.append(tuple(node.token_id for node in search.settled().path()))
    best = tuple(node.token_id for node in search.hypotheses()[0].node.path())
    for earlier, later in pairwise(settled):
        assert later[: len(earlier)] == earlier
    assert best[: len(settled[-1])] == settled[-1]


@given(searches(max_groups=3) | searches(max_groups=1))
def test_as_many_hypotheses_as_beams_best_first(case):
    seed, params, end_ids, max_tokens = case
    found = searched(table_model(seed), params, end_ids, max_tokens)
    assert len(found) == params.num_beams
    assert sorted((hypothesis.score for hypothesis in found), reverse=True) == [h.score for h in found]
    for hypothesis in found:
        assert (hypothesis.tokens[-1] in end_ids) == (hypothesis.reason is FinishReason.STOP)
        assert not end_ids.intersection(hypothesis.tokens[:-1])


def test_fewer_outcomes_than_beams_are_all_found():
    """As under a grammar: after `1` only the end is possible, after the prompt only `1` and `2`."""

    def model(output):
        logprobs = np.full(VOCAB, -np.inf, dtype=np.float32)
        logprobs[[1, 2] if not output else [0]] = [-0.5, -1.0] if not output else [0.0]
        return logprobs

    params = BeamParams(num_beams=4, length_penalty=0.0)
    found = searched(model, params, {0}, 5)
    assert [(hypothesis.tokens, hypothesis.score) for hypothesis in found] == [((1, 0), -0.5), ((2, 0), -1.0)]
