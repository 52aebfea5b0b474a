"""The sampler's kernels against the CPU sampler: each case is a property, of which is said whether it holds.

`test_sampler_kernels.py` runs this where Triton interprets. On a machine with a GPU
`PYTHONPATH=.:tests python tests/text/sampling/sampler_cases.py` asks the same of the compiled kernels.
"""

from __future__ import annotations

import math
import os
import random
import sys
import traceback
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from markov import Markov, generate, markov_engine, request
from token_device import RandomLength

from models.staging import Staging
from serve.request import SamplingParams
from serve.text import runner
from serve.text.sampling import arithmetic
from serve.text.sampling.device_sampler import DeviceSampler
from serve.text.sampling.gumbel import GumbelNoise, row_key, seed_state
from serve.text.sampling.sampler import Proposal, Sampled, Sampler, make_sampler
from serve.text.sequence import PENDING, Row, Sequence

torch.set_num_threads(1)
CPU = torch.device("cpu")
DEVICE = CPU if os.environ.get("TRITON_INTERPRET") == "1" else torch.device("cuda")
LLAMA = 128_256


def row(name, *, prompt=(5, 6, 3), output=(), pending=False, position=None, matcher=None, **params) -> Row:
    token_ids = [*prompt, *output]
    job = Sequence(
        id=name, token_ids=token_ids, num_prompt=len(prompt), matcher=matcher,
        sampling=SamplingParams(**{"max_tokens": 100} | params),
    )  # fmt: skip
    at = len(token_ids) + pending if position is None else position
    newest = PENDING if pending else token_ids[-1]
    return Row(job, 0, [newest], at - 1, [0], samples=True, sample_position=at)


def sample(sampler, logits_RV, rows, *, inputs=None, proposals=None, behind=None, keeps_scores=False) -> Sampled:
    """By either sampler, on its own device; the result on the host."""
    device = DEVICE if isinstance(sampler, DeviceSampler) else CPU
    if proposals is not None:
        proposals = [
            Proposal(p.token_id, p.scores_V.to(device)) if p is not None and p.scores_V is not None else p
            for p in proposals
        ]
    staging = Staging(device)
    plan = sampler.plan(rows, staging, proposals=proposals)
    inputs_R = behind_R = None
    if plan.needs_inputs:
        inputs_R = torch.tensor(inputs or [row.token_ids[-1] for row in rows], device=device)
    if behind is not None:
        behind_R = torch.full((len(rows),), behind, device=device)
    staging.send()
    found = sampler.sample(logits_RV.to(device), plan, inputs_R, behind_R, keeps_scores=keeps_scores)
    found.token_ids_R, found.best_R = found.token_ids_R.cpu(), found.best_R.cpu()
    found.processed_RV = None if found.processed_RV is None else found.processed_RV.cpu()
    return found


def both(vocab_size: int) -> tuple[Sampler, DeviceSampler]:
    device = make_sampler(vocab_size, (2,), DEVICE)
    assert isinstance(device, DeviceSampler)
    return Sampler(vocab_size, (2,), CPU), device


def require_equal(logits_RV, rows, samplers=None, **options) -> Sampled:
    reference, device = samplers or both(logits_RV.shape[1])
    expected, found = (sample(sampler, logits_RV, rows, **options) for sampler in (reference, device))
    asked = [row.job.sampling for row in rows]
    for one, other, params in zip(expected.token_ids_R.tolist(), found.token_ids_R.tolist(), asked, strict=True):
        assert one == other, params
    assert torch.equal(expected.best_R, found.best_R)
    assert expected.scored == found.scored
    if expected.processed_RV is not None:
        assert torch.equal(expected.processed_RV, found.processed_RV)
    return found


def random_logits(num_rows: int, vocab_size: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def unlike(rng: random.Random, num_rows: int, vocab_size: int) -> torch.Tensor:
    """Rows of several kinds: peaked, flat, with many equal scores, as bfloat16 gives them, partly impossible."""
    logits = random_logits(num_rows, vocab_size, seed=rng.getrandbits(30))
    for logits_V in logits:
        kind = rng.randrange(6)
        if kind < 3:
            logits_V *= (0.05, 0.4, 3.0)[kind]
        elif kind == 3:
            logits_V.round_()
        elif kind == 4:
            logits_V.copy_(logits_V.bfloat16())
        elif vocab_size > 8:
            logits_V[rng.randrange(vocab_size // 2) + 1 :] = -math.inf
    return logits


def mixture(rng: random.Random, vocab_size: int, name: str) -> Row:
    """What a request might ask, and sometimes what none would."""
    maybe = lambda share, value: {} if rng.random() > share else value()  # noqa: E731
    token = lambda: rng.randrange(vocab_size)  # noqa: E731
    params = {"seed": rng.getrandbits(64), "temperature": rng.choice([0.0, 1e-30, 0.3, 0.7, 1.0, 1.0, 1.6, 50.0])}
    params |= maybe(0.4, lambda: {"top_k": rng.choice([1, 2, 5, 20, 40, vocab_size, 2 * vocab_size, token() + 1])})
    params |= maybe(0.4, lambda: {"top_p": rng.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, rng.random()])})
    params |= maybe(0.3, lambda: {"min_p": rng.choice([1e-6, 0.05, 0.3, 1.0])})
    params |= maybe(0.3, lambda: {"repetition_penalty": rng.choice([0.7, 1.1, 1.9])})
    params |= maybe(0.3, lambda: {"frequency_penalty": rng.uniform(-2, 2), "presence_penalty": rng.uniform(-2, 2)})
    params |= maybe(
        0.3, lambda: {"logit_bias": tuple((token(), rng.uniform(-9, 9)) for _ in range(rng.randint(1, 300)))}
    )
    params |= maybe(0.3, lambda: {"min_tokens": rng.randrange(6), "stop_token_ids": (token(), token())})
    params |= maybe(0.2, lambda: {"logprobs": rng.randrange(3)})
    prompt = [token() for _ in range(rng.randint(1, 9))]
    return row(name, prompt=prompt, output=[token() for _ in range(rng.randrange(9))], **params)


# -- cases -------------------------------------------------------------------------------------------------------------


def rows_of_any_kind_draw_the_tokens_of_the_reference() -> None:
    rng = random.Random(1)
    for number, vocab_size in enumerate((1 + 2, 33, 300, 4096, 4097, 9001)):
        rows = [mixture(rng, vocab_size, f"{number}-{i}") for i in range(10)]
        require_equal(unlike(rng, len(rows), vocab_size), rows, keeps_scores=number > 2)


def a_nucleus_of_nearly_all_tokens_is_that_of_the_reference() -> None:
    """The groups' maxima, of which here each holds a token of its own, tell nothing of it."""
    for vocab_size in (4096, 8000):
        rows = [row(f"{i}", seed=i, top_p=top_p) for i, top_p in enumerate((0.9, 0.999))]
        require_equal(random_logits(len(rows), vocab_size, scale=0.15), rows, keeps_scores=True)


def a_vocabulary_of_128256_draws_the_tokens_of_the_reference() -> None:
    kinds = [{"top_p": 0.9, "temperature": 0.6}, {"min_p": 0.002, "top_k": 50, "top_p": 0.95}, {}]
    rows = [row(f"{i}", seed=i, **kind) for i, kind in enumerate(kinds)]
    require_equal(random_logits(len(rows), LLAMA, scale=2.0), rows)


def equal_scores_at_a_threshold_all_stay_and_the_first_of_equals_is_drawn() -> None:
    logits = random_logits(6, 700, scale=1.0, seed=3).round()
    kinds = [{"top_k": 7}, {"top_p": 0.2}, {"min_p": 0.4}, {"top_k": 650}, {"top_p": 0.97}]
    rows = [row(f"{i}", seed=i, **kind) for i, kind in enumerate(kinds)] + [row("g", temperature=0.0, min_tokens=9)]
    kept = require_equal(logits, rows, keeps_scores=True).processed_RV
    for kept_V, logits_V in zip(kept, logits):
        left = logits_V[kept_V.isfinite()]
        assert (left.min() <= logits_V).sum() - len(left) <= 1  # the end token, masked
    zeros = torch.zeros(3, 5000)
    greedy = [row("a", temperature=0.0), row("b", temperature=0.0, logit_bias=((0, -1.0),)), row("c", seed=4, top_k=1)]
    assert require_equal(zeros, greedy).token_ids_R.tolist()[:2] == [0, 1]


def a_row_draws_the_same_bits_alone_and_in_any_batch() -> None:
    rng = random.Random(5)
    vocab_size, num_rows = 4500, 6
    rows = [mixture(rng, vocab_size, f"{i}") for i in range(num_rows)]
    logits = unlike(rng, num_rows, vocab_size)
    device = both(vocab_size)[1]
    together = sample(device, logits, rows, keeps_scores=True)
    backwards = sample(device, logits.flip(0), rows[::-1])
    assert torch.equal(backwards.token_ids_R.flip(0), together.token_ids_R)
    for i in range(num_rows):
        alone = sample(device, logits[i : i + 1], rows[i : i + 1], keeps_scores=True)
        assert alone.token_ids_R[0] == together.token_ids_R[i]
        assert torch.equal(alone.processed_RV[0], together.processed_RV[i])


def rows_that_are_not_finite_are_told_and_their_mates_unharmed() -> None:
    kinds = [{"temperature": 0.0, "logit_bias": ((1, 1.0),)}, {}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}]
    vocab_size = 5000
    reference, device = both(vocab_size)
    logits = random_logits(3 * len(kinds), vocab_size)
    logits[1::3, 4200], logits[2::3, 17] = math.nan, math.inf
    rows = [row(f"{i}", seed=i, **kinds[i // 3]) for i in range(len(logits))]
    expected, found = sample(reference, logits, rows), sample(device, logits, rows)
    assert found.best_R.isfinite().tolist() == [True, False, False] * len(kinds)
    assert torch.equal(found.best_R.isnan(), expected.best_R.isnan())
    assert torch.equal(found.token_ids_R[::3], expected.token_ids_R[::3])
    assert ((found.token_ids_R >= 0) & (found.token_ids_R < vocab_size)).all()
    nothing = torch.full((2, 300), -math.inf)
    found = sample(both(300)[1], nothing, [row("a", temperature=0.0, min_tokens=1), row("b", top_p=0.5)])
    assert int(found.token_ids_R.max()) < 300 and not found.best_R.isfinite().any()


def logits_of_bfloat16_give_the_tokens_of_the_same_logits_in_float32() -> None:
    logits = random_logits(3, 4500).bfloat16()
    rows = [row("a"), row("b", top_k=30, logprobs=2), row("c", temperature=0.0, logit_bias=((9, 3.0),))]
    require_equal(logits, rows)


def history_is_that_of_the_sequence_through_pending_tokens_drafts_and_preemption() -> None:
    """The device sees inputs only: the host's token ids stay as they were, or come later, in other epochs too."""
    vocab_size, prompt, rng = 40, [5, 6, 5], random.Random(2)
    asked = {"seed": 3, "repetition_penalty": 1.7, "frequency_penalty": 0.9, "presence_penalty": 0.4, "max_tokens": 40}
    reference, device = both(vocab_size)
    text, known = list(prompt), list(prompt)
    job = Sequence(id="one", token_ids=known, num_prompt=len(prompt), sampling=SamplingParams(**asked))
    for step in range(9):
        logits = random_logits(4, vocab_size, seed=step)
        # The host believes that all drafts of the step before hold: up to two positions too many.
        behind = rng.randrange(3)
        drafts = [rng.randrange(vocab_size) for _ in range(rng.randrange(4))]
        unknown = len(text) > len(known)
        base = Row(job, step // 3, [PENDING if unknown else text[-1]], 0, [0], True, len(text) + behind)  # type: ignore[arg-type]
        base.drafts = drafts
        draws = [base.after(i) for i in range(len(drafts) + 1)]
        found = sample(device, logits[: len(draws)], draws, inputs=[text[-1], *drafts], behind=behind)
        found = found.token_ids_R.tolist()
        expected = []
        for i in range(len(draws)):
            alone = row(f"{step}-{i}", prompt=prompt, output=[*text[len(prompt) :], *drafts[:i]], **asked)
            expected += sample(reference, logits[i : i + 1], [alone]).token_ids_R.tolist()
        assert found == expected, step
        num_accepted = rng.randrange(len(drafts) + 1)
        text += [*drafts[:num_accepted], found[num_accepted]]
        if step % 4 == 3:  # the host has caught up
            known[:] = text
    assert len(text) > 15


@dataclass
class Allowing:
    """A `Matcher` of which only the mask counts."""

    token_ids: list[int] | None
    vocab_size: int

    def mask(self, after: list[int]) -> bytes | None:
        if self.token_ids is None:
            return None
        bits = np.zeros(-(-self.vocab_size // 32) * 32, np.uint8)
        bits[self.token_ids] = 1
        return np.packbits(bits, bitorder="little").tobytes()


def masks_of_grammars_rule_out_what_they_do_in_the_reference() -> None:
    vocab_size, rng = 4500, random.Random(8)
    kinds = [{"temperature": 0.0}, {}, {"top_p": 0.7}, {"frequency_penalty": 1.0, "logit_bias": ((3, 20.0),)}, {}]
    allowed = [rng.sample(range(vocab_size), 50) for _ in kinds[:-1]] + [None]
    rows = [
        row(f"{i}", seed=i, min_tokens=3, matcher=Allowing(token_ids, vocab_size), **kind)  # type: ignore[arg-type]
        for i, (kind, token_ids) in enumerate(zip(kinds, allowed))
    ] + [row("free", temperature=0.0), row("penalised", presence_penalty=1.0, top_k=3)]
    found = require_equal(random_logits(len(rows), vocab_size), rows)
    assert all(int(token) in ids for token, ids in zip(found.token_ids_R, allowed[:-1]))


def drafts_are_decided_on_as_in_the_reference() -> None:
    vocab_size, rng = 300, random.Random(4)
    for batch, scale in enumerate((0.3, 2.0)):
        kinds = [{}, {"temperature": 0.6, "top_k": 40}, {"top_p": 0.8}, {"min_p": 0.02, "presence_penalty": 1.0}]
        rows = [row(f"{i}", seed=10 * batch + i, **kinds[i % 4]) for i in range(12)] + [row("g", temperature=0.0)]
        logits = random_logits(len(rows), vocab_size, scale, seed=batch)
        drafts = logits + random_logits(len(rows), vocab_size, 0.5, seed=50 + batch)
        drafts[3] = logits[3]
        proposals = []
        for i in range(len(rows)):
            likely = int(drafts[i].softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(i)))
            proposals.append([Proposal(likely, drafts[i]), Proposal(likely, None), None][rng.randrange(3)])
        found = require_equal(logits, rows, proposals=proposals)
        held = sum(p is not None and p.token_id == token for p, token in zip(proposals, found.token_ids_R.tolist()))
        assert held
    # Nothing is left of p where q is the same: then p itself is drawn from, or the draft holds.
    logits = torch.zeros(8, 2)
    same = [Proposal(0, torch.zeros(2)) for _ in range(8)]
    require_equal(logits, [row(f"{i}", prompt=(1,), seed=i) for i in range(8)], proposals=same)


def an_engine_that_drafts_and_overlaps_gives_the_outputs_of_the_reference() -> None:
    """The engine's own device is the CPU, so this is the interpreter's only."""
    if DEVICE.type != "cpu":
        return
    target, drafter = Markov.random(6, seed=1, scale=0.8), Markov.random(6, seed=2, scale=1.2)
    asked = [
        {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.4},
        {"top_p": 0.8, "logit_bias": ((3, -100.0),), "min_tokens": 3, "stop_token_ids": (2,)},
        {"temperature": 0.0},
    ]
    for rejects in (False, True):
        outputs = []
        for make in (make_sampler, Sampler):
            runner.make_sampler = make
            engine = markov_engine(
                target, drafter=drafter, draft_length=RandomLength(3), depth=1, rejects=rejects, num_blocks=12
            )
            assert isinstance(engine._runner._sampler, DeviceSampler) == (make is make_sampler)
            outputs.append(
                generate(engine, [request([1, 2, 0], seed=i, max_tokens=7, **p) for i, p in enumerate(asked)])
            )
        assert outputs[0] == outputs[1], rejects


@triton.jit
def _noise(hashed_ptr, states_ptr, positions_ptr, out_ptr, rows: tl.constexpr, vocab: tl.constexpr):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    at = tl.arange(0, vocab)
    state = arithmetic.draw_state(tl.load(states_ptr + row), tl.load(positions_ptr + row), 0)
    noise = arithmetic.log_standard_exponential(tl.load(hashed_ptr + at)[None, :], state[:, None])
    tl.store(out_ptr + row[:, None] * vocab + at[None, :], noise)


@triton.jit
def _functions(x_ptr, exponentials_ptr, logarithms_ptr, num: tl.constexpr):
    at = tl.program_id(0) * num + tl.arange(0, num)
    x = tl.load(x_ptr + at)
    tl.store(exponentials_ptr + at, arithmetic.exponential(x))
    tl.store(logarithms_ptr + at, arithmetic.logarithm(-x))


def noise_has_the_bits_of_the_reference_and_errs_by_less_than_1e_6() -> None:
    """Another bit of the hash is another number altogether. 65536 draws from 256 tokens: the very tokens."""
    num_rows, vocab_size = 4096, 256
    at_once = num_rows if DEVICE.type == "cpu" else 16
    noise = GumbelNoise(vocab_size, CPU)
    out = torch.empty(num_rows, vocab_size, device=DEVICE)
    for first in range(0, 4 * num_rows, num_rows):
        seeds = [(first + i) * 0x9E3779B97F4A7C1 for i in range(num_rows)]
        halves = torch.tensor([seed_state(seed) for seed in seeds])
        states = (halves[:, 0] & 0xFFFFFFFF) | (halves[:, 1] << 32)
        positions = torch.arange(num_rows, dtype=torch.int32) + first
        keys = noise.hashed_V.to(DEVICE), states.to(DEVICE), positions.to(DEVICE)
        _noise[(num_rows // at_once,)](*keys, out, at_once, vocab_size, enable_fp_fusion=False)
        expected = noise.log_exponential([row_key(seed, at) for seed, at in zip(seeds, positions.tolist())])
        found = out.cpu()
        assert float((found - expected).abs().max()) < 1e-6
        logits = random_logits(num_rows, vocab_size, seed=first)
        assert torch.equal((logits - found).argmax(-1), (logits - expected).argmax(-1))


def exponential_and_logarithm_err_by_less_than_a_unit_in_the_last_place() -> None:
    num = 1 << 18
    at_once = num if DEVICE.type == "cpu" else 4096
    x = -(80 * torch.rand(num, generator=torch.Generator().manual_seed(0)) ** 4).clamp_min(1e-12)
    exponentials, logarithms = torch.empty(2, num, device=DEVICE)
    _functions[(num // at_once,)](x.to(DEVICE), exponentials, logarithms, at_once, enable_fp_fusion=False)
    for found, exact in ((exponentials.cpu(), x.double().exp()), (logarithms.cpu(), (-x).double().log())):
        unit = torch.from_numpy(np.spacing(exact.float().abs().numpy())).double()
        assert float(((found.double() - exact).abs() / unit).max()) < 1.0


CASES = [
    rows_of_any_kind_draw_the_tokens_of_the_reference,
    a_nucleus_of_nearly_all_tokens_is_that_of_the_reference,
    a_vocabulary_of_128256_draws_the_tokens_of_the_reference,
    equal_scores_at_a_threshold_all_stay_and_the_first_of_equals_is_drawn,
    a_row_draws_the_same_bits_alone_and_in_any_batch,
    rows_that_are_not_finite_are_told_and_their_mates_unharmed,
    logits_of_bfloat16_give_the_tokens_of_the_same_logits_in_float32,
    history_is_that_of_the_sequence_through_pending_tokens_drafts_and_preemption,
    masks_of_grammars_rule_out_what_they_do_in_the_reference,
    drafts_are_decided_on_as_in_the_reference,
    an_engine_that_drafts_and_overlaps_gives_the_outputs_of_the_reference,
    noise_has_the_bits_of_the_reference_and_errs_by_less_than_1e_6,
    exponential_and_logarithm_err_by_less_than_a_unit_in_the_last_place,
]

if __name__ == "__main__":
    for case in CASES:
        if len(sys.argv) > 1 and case.__name__ not in sys.argv[1:]:
            continue
        try:
            case()
            print(f"{case.__name__}: holds")
        except Exception:
            print(f"{case.__name__}: {traceback.format_exc()[-2000:]}")
