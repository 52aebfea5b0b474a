"""The sampler: distributions against transformers' processors and a chi-square test, independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.staging import Staging
from serve.errors import RequestFailed
from serve.request import SamplingParams
from serve.text.sampling.gumbel import GumbelNoise, row_key
from serve.text.sampling.sampler import Sampled, Sampler, require_finite
from serve.text.sequence import PENDING, Row, Sequence

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 300
EOS = 2


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(VOCAB, (EOS,), CPU)


def row(name: str = "job", *, prompt=(5, 6, 7), output=(), pending=False, position=None, **params) -> Row:
    token_ids = [*prompt, *output]
    job = Sequence(
        id=name,
        token_ids=token_ids,
        num_prompt=len(prompt),
        sampling=SamplingParams(**{"max_tokens": 100, **params}),
    )
    at = len(token_ids) + pending if position is None else position
    last = PENDING if pending else token_ids[-1]
    return Row(job, 0, [last], at - 1, [0], samples=True, sample_position=at)


def random_logits(num_rows: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sample(sampler: Sampler, logits_RV: torch.Tensor, rows: list[Row], **options) -> Sampled:
    return sampler.sample(logits_RV, sampler.plan(rows, Staging(CPU)), **options)


def draws(sampler: Sampler, logits_V: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    return sample(sampler, logits_V.expand(len(rows), -1), rows).token_ids_R


def test_greedy_rows_take_the_largest_logit(sampler):
    logits = random_logits(4)
    rows = [row(f"{i}", temperature=0.0) for i in range(4)]
    assert sample(sampler, logits, rows).token_ids_R.tolist() == logits.argmax(-1).tolist()


def test_sampling_leaves_the_logits_as_they_are(sampler):
    logits = random_logits(2)
    before = logits.clone()
    sample(sampler, logits, [row("a", temperature=0.5, top_k=3), row("b", temperature=0.0, logit_bias=((4, 50.0),))])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.97},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "min_p": 0.05, "top_k": 40, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_processed_distribution(params, varied):
    """Chi-square over 20 000 draws; fails by luck with probability 1e-5 a case, once: the seeds are fixed."""
    vocab, num_draws = 50, 20_000
    sampler = Sampler(vocab, (EOS,), CPU)
    logits = random_logits(1, vocab, scale=1.5)[0]
    if varied == "seed":
        rows = [row(f"{i}", seed=i, **params) for i in range(num_draws)]
    else:
        rows = [row("one", seed=99, position=i + 3, **params) for i in range(num_draws)]
    expected = sampler.processed(logits[None], rows[:1])[0].softmax(-1) * num_draws
    counts = torch.bincount(draws(sampler, logits, rows), minlength=vocab)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = wanted > 0
    statistic = float(((observed[keep] - wanted[keep]) ** 2 / wanted[keep]).sum())
    degrees = int(keep.sum()) - 1
    # Wilson-Hilferty: chi-square to a normal; 4.265 is its 1 - 1e-5 quantile.
    normal = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert normal < 4.265


def test_a_rare_token_of_a_large_vocabulary_is_drawn_as_often_as_it_should_be():
    """One token holds 1e-3 against 32 000 equal others: the tail of the uniform decides. Six sigma: 2e-9 by luck."""
    vocab, num_draws = 32_001, 4000
    sampler = Sampler(vocab, (), CPU)
    logits = torch.zeros(vocab)
    logits[7] = math.log(32_000 * 0.05 / 0.95)
    rows = [row("one", seed=1, position=i + 3) for i in range(num_draws)]
    drawn = torch.cat([draws(sampler, logits, rows[at : at + 100]) for at in range(0, num_draws, 100)])
    hits = int((drawn == 7).sum())
    assert abs(hits - 0.05 * num_draws) < 6 * math.sqrt(num_draws * 0.05 * 0.95)
    others = drawn[drawn != 7].double()
    assert abs(float(others.mean()) / 16_000 - 1) < 6 * (1 / math.sqrt(3)) / math.sqrt(len(others))


def test_processed_scores_equal_transformers_processors(sampler):
    logits = random_logits(1)
    output = [9, 9, 11, 40]
    request = row(output=output, temperature=0.8, repetition_penalty=1.3, min_p=0.02, top_k=60, top_p=0.9)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([request.job.token_ids]), logits.clone())
    for warper in (
        TemperatureLogitsWarper(0.8),
        MinPLogitsWarper(0.02),
        TopKLogitsWarper(60),
        TopPLogitsWarper(0.9),
    ):
        theirs = warper(None, theirs)
    ours = sampler.processed(logits, [request])
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1 - 1e-7])
def test_nucleus_equals_transformers_on_peaked_and_flat_rows(sampler, top_p):
    for scale in (0.01, 1.0, 20.0):
        logits = random_logits(1, scale=scale, seed=3)
        theirs = TopPLogitsWarper(top_p)(None, logits.clone())
        ours = sampler.processed(logits, [row(top_p=top_p)])
        # The last token may differ where the mass before it equals top_p within rounding.
        assert int((ours.isinf() != theirs.isinf()).sum()) <= 1


def test_presence_and_frequency_penalties_count_the_output_only(sampler):
    logits = random_logits(1)
    request = row(prompt=(5, 5), output=(9, 9, 11), presence_penalty=0.5, frequency_penalty=0.25)
    change = (sampler.processed(logits, [request]) - logits)[0]
    expected = torch.zeros(VOCAB)
    expected[9], expected[11] = -1.0, -0.75
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)


def test_penalties_count_a_token_that_only_the_device_knows(sampler):
    logits = random_logits(1)
    known = row(output=(9, 11), repetition_penalty=1.5, frequency_penalty=0.5)
    pending = row(output=(9,), pending=True, repetition_penalty=1.5, frequency_penalty=0.5)
    assert torch.equal(
        sampler.processed(logits, [known]), Sampler(VOCAB, (), CPU).processed(logits, [pending], torch.tensor([11]))
    )


def test_history_follows_a_growing_sequence(sampler):
    logits = random_logits(1)
    first = row(output=(9,), frequency_penalty=1.0)
    sample(sampler, logits, [first])
    first.job.token_ids.append(11)
    grown = Row(first.job, 0, [11], 4, [0], samples=True, sample_position=5)
    fresh = row("other", output=(9, 11), frequency_penalty=1.0)
    assert torch.equal(sampler.processed(logits, [grown]), sampler.processed(logits, [fresh]))


def test_logit_bias_is_added_and_repeated_entries_sum(sampler):
    logits = random_logits(1)
    change = sampler.processed(logits, [row(logit_bias=((3, 5.0), (4, -100.0)))]) - logits
    assert change[0, 3] == pytest.approx(5.0) and change[0, 4] == pytest.approx(-100.0, rel=1e-5)
    assert int(change.count_nonzero()) == 2


def test_end_tokens_wait_for_min_tokens(sampler):
    logits = random_logits(1)
    logits[0, EOS], logits[0, 17] = 50.0, 60.0
    for output, expected in (((), None), ((9,), None), ((9, 9), 17)):
        request = row(f"{len(output)}", output=output, temperature=0.0, min_tokens=2, stop_token_ids=(17,))
        chosen = int(draws(sampler, logits[0], [request])[0])
        assert chosen == expected if expected is not None else chosen not in (EOS, 17)


def test_ignored_end_token_may_come_early(sampler):
    logits = random_logits(1)
    logits[0, EOS] = 50.0
    request = row(temperature=0.0, min_tokens=5, ignore_eos=True)
    assert int(draws(sampler, logits[0], [request])[0]) == EOS


def test_equal_scores_at_the_border_of_a_filter_all_stay(sampler):
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([2.0, 1.0, 1.0])
    assert sampler.processed(logits, [row(top_k=2)]).isfinite().sum() == 3
    assert sampler.processed(logits, [row(top_p=0.012)]).isfinite().sum() <= 3


@pytest.mark.parametrize("vocab", [VOCAB, 1021, 70_001])
def test_a_row_draws_the_same_bits_in_any_batch(vocab):
    sampler = Sampler(vocab, (EOS,), CPU)
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 20, "min_p": 0.001},
        {"temperature": 0.9, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 2},
    ]
    rows = [row(f"{i}", seed=i, output=(i, i + 1), **kinds[i % len(kinds)]) for i in range(11)]
    logits = random_logits(len(rows), vocab)
    together = sampler.processed(logits, rows)
    for i, request in enumerate(rows):
        assert torch.equal(sampler.processed(logits[i : i + 1], [request])[0], together[i])
    alone = [int(sample(sampler, logits[i : i + 1], [r]).token_ids_R[0]) for i, r in enumerate(rows)]
    backwards = sample(sampler, logits.flip(0), rows[::-1]).token_ids_R.flip(0)
    assert sample(sampler, logits, rows).token_ids_R.tolist() == alone == backwards.tolist()


def test_noise_is_the_same_everywhere_and_forever():
    """The bits are part of the product: a replay on another version must draw the same tokens."""
    bits = GumbelNoise(5, CPU).bits([row_key(0, 0), row_key(12345678901234567890, 77)])
    assert bits.tolist() == GOLDEN_BITS


GOLDEN_BITS = [
    [361613020, 1270468520, -2073082469, 1003606752, -904082538],
    [896412016, 656464831, -1231103187, 1594511904, 323548978],
]


def test_noise_bits_are_even_and_uncorrelated():
    """Each of 32 bits over 2^20 samples, and neighbours in token, position and seed. Six sigma: 4e-7 by luck."""
    noise = GumbelNoise(4096, CPU)
    by_position = noise.bits([row_key(5, i) for i in range(256)])
    by_seed = noise.bits([row_key(1000 + i, 5) for i in range(256)])
    bound = 6 * 0.5 / math.sqrt(by_position.numel())
    pairs = {
        "position": by_position,
        "next token": by_position ^ by_position.roll(1, 1),
        "next position": by_position ^ by_position.roll(1, 0),
        "next seed": by_seed ^ by_seed.roll(1, 0),
        "seed and position": by_seed ^ by_position,
        "next bit": by_position ^ (by_position << 1),
    }
    for name, bits in pairs.items():
        for shift in range(1, 32):
            share = float(((bits >> shift) & 1).double().mean())
            assert abs(share - 0.5) < bound, (name, shift)


def test_noise_is_finite_for_every_extreme_of_the_hash(monkeypatch):
    noise = GumbelNoise(4, CPU)
    extremes = torch.tensor([[-(2**31), 0, 2**31 - 1, -1]], dtype=torch.int32)
    monkeypatch.setattr(noise, "bits", lambda keys: extremes.clone())
    assert noise.log_exponential([(0, 0)]).isfinite().all()


def test_logprobs_are_of_the_raw_distribution(sampler):
    logits = random_logits(3)
    rows = [
        row("a", temperature=0.0),
        row("b", temperature=0.3, top_k=5, logit_bias=((8, 100.0),), logprobs=3),
        row("c", temperature=0.0, logprobs=0),
    ]
    sampled = sample(sampler, logits, rows)
    assert sampled.scored == [1, 2]
    assert sampled.scores is not None
    biased, greedy = sampled.scores.tolist([3, 0])
    raw = logits.log_softmax(-1)
    assert biased.token_id == 8
    assert biased.logprob == pytest.approx(float(raw[1, 8]))
    assert biased.rank == int((raw[1] > raw[1, 8]).sum()) + 1
    assert [token_id for token_id, _ in biased.top] == raw[1].topk(3).indices.tolist()
    assert greedy.rank == 1 and greedy.top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_row_that_is_not_finite_is_reported_and_named(sampler, bad, params):
    logits = random_logits(3)
    logits[1, 100] = bad
    rows = [row("good", **params), row("poisoned", **params), row("fine", **params)]
    best = sample(sampler, logits, rows).best_R.tolist()
    assert [math.isfinite(value) for value in best] == [True, False, True]
    with pytest.raises(RequestFailed, match="poisoned"):
        require_finite(best, rows)
    require_finite(best[:1], rows[:1])


def test_masked_vocabulary_is_no_fault_and_never_drawn(sampler):
    logits = random_logits(1)[0]
    logits[100:] = -math.inf
    rows = [row(f"{i}", seed=i) for i in range(500)]
    sampled = sample(sampler, logits.expand(500, -1), rows)
    assert sampled.best_R.isfinite().all() and int(sampled.token_ids_R.max()) < 100


def test_scores_are_kept_as_they_were_before_the_noise(sampler):
    rows = [row("a", temperature=0.7, top_k=9), row("b", temperature=0.0), row("c", top_p=0.5)]
    logits = random_logits(3)
    kept = sample(sampler, logits, rows, keeps_scores=True).processed_RV
    assert torch.equal(kept, sampler.processed(logits, rows))


def test_a_draw_behind_its_row_is_that_of_the_position_where_it_truly_is(sampler):
    logits = random_logits(1)[0].expand(6, -1)
    rows = [row(f"{i}", seed=i, position=20) for i in range(6)]
    behind = torch.tensor([0, 1, 2, 3, 0, 4])
    there = [row(f"{i} there", seed=i, position=20 - int(n)) for i, n in enumerate(behind)]
    assert (
        sample(sampler, logits, rows, behind_R=behind).token_ids_R.tolist() == draws(sampler, logits[0], there).tolist()
    )


def test_a_tiny_temperature_is_almost_greedy(sampler):
    logits = random_logits(1)[0]
    rows = [row(f"{i}", seed=i, temperature=1e-30) for i in range(5)]
    assert draws(sampler, logits, rows).unique().tolist() == [int(logits.argmax())]
