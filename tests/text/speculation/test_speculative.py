"""Speculation changes nothing: coupled draws give plain sampling's tokens, rejection sampling its distribution.

The chi-square tests compare whole outputs of the real scheduler, runner and sampler with their exact probabilities, in
batches, with other numbers of drafts every step. Each fails by luck with probability 1e-5, once: seeds are fixed.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markov import Markov, exact, generate, markov_engine, request
from token_device import RandomLength

import serve.text.sampling.sampler
from serve.text.sampling.gumbel import Stream, row_key, uniform
from serve.text.speculation.prompt_lookup import PromptLookup
from serve.text.speculation.verification import reject_, until_rejected

torch.set_num_threads(1)
VOCAB, LENGTH, NUM_OUTPUTS, AT_ONCE = 4, 4, 8000, 64
PROMPT = [1, 2, 0, 1, 2]
ALARM = 4.265
"""Quantile 1 - 1e-5 of the normal distribution."""
CASES = {
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 1.2, "top_p": 0.8},
    "min-p, top-k": {"temperature": 1.0, "min_p": 0.05, "top_k": 4},
    "penalties": {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.4},
    "mask": {"temperature": 1.0, "logit_bias": ((3, -100.0), (2, 0.5))},
    "minimum length": {"temperature": 1.0, "stop_token_ids": (2,), "min_tokens": LENGTH},
}
TARGET, DRAFTER = Markov.random(VOCAB, seed=1, scale=0.8), Markov.random(VOCAB, seed=2, scale=1.2)


def alarm(outputs: Counter, chances: dict[tuple[int, ...], float]) -> float:
    """Chi-square of outputs against their chances as a standard normal deviate (Wilson and Hilferty, 1931)."""
    total = sum(outputs.values())
    assert all(chances[output] > 0 for output in outputs)
    cells = [(outputs[output], total * chance) for output, chance in chances.items() if total * chance >= 5]
    rest = (total - sum(seen for seen, _ in cells), total - sum(wanted for _, wanted in cells))
    cells += [rest] if rest[1] > 0.5 else []
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    degrees = len(cells) - 1
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def sampled(params: dict, *, rejects: bool, target=TARGET, drafter=DRAFTER) -> Counter:
    """Outputs of as many seeds, in batches of several."""
    outputs: Counter = Counter()
    engine = markov_engine(target, drafter=drafter, draft_length=RandomLength(4), rejects=rejects)
    for first in range(0, NUM_OUTPUTS, AT_ONCE):
        jobs = [request(PROMPT, seed=seed, max_tokens=LENGTH, **params) for seed in range(first, first + AT_ONCE)]
        outputs.update(generate(engine, jobs))
    return outputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("drafter", ["draft model", "n-gram"])
@pytest.mark.parametrize("rejects", [True, False], ids=["standard", "coupled"])
def test_outputs_are_distributed_as_without_speculation(case, drafter, rejects):
    proposer = DRAFTER if drafter == "draft model" else PromptLookup(1, 2)
    outputs = sampled(CASES[case], rejects=rejects, drafter=proposer)
    assert alarm(outputs, exact(TARGET, PROMPT, LENGTH, **CASES[case])) < ALARM


def accept_everything(seed: int, position: int, stream: Stream) -> float:
    return 1e-30


def forget_the_residual_(scores_RV, drafts_R, draft_scores_RV, uniforms_R):
    """Draws what replaces a rejected draft from p, not from what p has beyond q."""
    untouched = scores_RV.clone()
    reject_(scores_RV, drafts_R, draft_scores_RV, uniforms_R)
    was_rejected = torch.isfinite(scores_RV).sum(-1) != 1
    scores_RV[was_rejected] = untouched[was_rejected]


def mistake_the_temperature_(scores_RV, drafts_R, draft_scores_RV, uniforms_R):
    """As if the draft had been drawn from another distribution than it was."""
    reject_(scores_RV, drafts_R, draft_scores_RV / 2, uniforms_R)


def one_stream_for_all(seed: int, position: int, stream: Stream = Stream.TARGET) -> tuple[int, int]:
    """Draft and replacement share their noise (vllm#54282)."""
    return row_key(seed, position)


def decide_by_the_draft_noise(seed: int, position: int, stream: Stream) -> float:
    """The decision looks at a bit of the noise that made the draft: no longer independent of it."""
    return (row_key(seed, position, Stream.DRAFT)[1] % (1 << 32)) / 2**32 * 0.5 + uniform(seed, position, stream) * 0.5


@pytest.mark.parametrize(
    ("name", "biased"),
    [
        ("uniform", accept_everything),
        ("reject_", forget_the_residual_),
        ("reject_", mistake_the_temperature_),
        ("row_key", one_stream_for_all),
        ("uniform", decide_by_the_draft_noise),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_biased_verifier_is_caught(name, biased, monkeypatch):
    target, drafter = Markov.always(0.1, 0.5, 0.4), Markov.always(0.6, 0.35, 0.05)
    chances = exact(target, PROMPT, LENGTH)
    assert alarm(sampled({}, rejects=True, target=target, drafter=drafter), chances) < ALARM
    monkeypatch.setattr(serve.text.sampling.sampler, name, biased)
    assert alarm(sampled({}, rejects=True, target=target, drafter=drafter), chances) > ALARM


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=8),
    cases=st.lists(st.sampled_from([{"temperature": 0.0}, *CASES.values()]), min_size=8, max_size=8),
    most=st.integers(1, 6),
    depth=st.sampled_from([0, 1, 3]),
    budget=st.sampled_from([8, 20, 512]),
    num_blocks=st.sampled_from([14, 30, 512]),
    drafter=st.sampled_from(["ngram", "model", "model that runs ahead", "model that runs ahead"]),
)
def test_coupled_draws_give_the_very_tokens_of_plain_sampling(prompts, cases, most, depth, budget, num_blocks, drafter):
    """Greedy and sampled, whatever the drafts, their number, the batch, chunks, preemptions and overlap."""

    def jobs() -> list:
        limits = {"max_tokens": 24, "ignore_eos": False}
        return [request(p, seed=i, **limits | case) for i, (p, case) in enumerate(zip(prompts, cases))]

    engine = markov_engine(
        TARGET, drafter=PromptLookup(1, 3) if drafter == "ngram" else DRAFTER, draft_length=RandomLength(most),
        depth=depth, runs_ahead=drafter == "model that runs ahead",
        num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=budget,
    )  # fmt: skip
    assert generate(engine, jobs()) == [generate(markov_engine(TARGET), [job])[0] for job in jobs()]
    assert engine.scheduler.kv_cache.num_free == num_blocks


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=6),
    most=st.integers(1, 6),
    depth=st.sampled_from([0, 1]),
)
def test_greedy_tokens_are_the_same_with_rejection_sampling(prompts, most, depth):
    jobs = [request(p, temperature=0.0, max_tokens=16) for p in prompts]
    plain = generate(markov_engine(TARGET), [request(p, temperature=0.0, max_tokens=16) for p in prompts])
    engine = markov_engine(TARGET, drafter=DRAFTER, draft_length=RandomLength(most), rejects=True, depth=depth)
    assert generate(engine, jobs) == plain


def test_a_draft_model_that_is_the_target_has_every_draft_accepted():
    params = {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.4, "max_tokens": 40}
    for rejects in (False, True):
        engine = markov_engine(TARGET, drafter=TARGET, draft_length=RandomLength(5), rejects=rejects)
        jobs = [request(PROMPT, seed=seed, **params) for seed in range(10)]
        generate(engine, jobs)
        assert sum(job.num_drafted for job in jobs) > 100
        assert all(job.num_accepted == job.num_drafted for job in jobs)


@pytest.mark.parametrize(
    ("drawn", "drafts", "stand"),
    [([4], [], (4,)), ([4, 5, 6], [4, 5], (4, 5, 6)), ([4, 9, 6], [4, 5], (4, 9)), ([9, 5, 6], [4, 5], (9,))],
)
def test_draws_stand_up_to_the_first_that_is_not_its_draft(drawn, drafts, stand):
    assert until_rejected(drawn, drafts) == stand
