"""The draft model's cache: what the target finds in its prefix cache, or loses by preemption, the draft makes good.

The draft is the target itself, greedy: a draft fails only where the draft's cache is not what it should be.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder
from token_device import RandomLength

from models.attention.base import KVCacheSpec
from models.attention.build import make_attention
from models.registry import load_text_model
from serve.engine.engine import Engine
from serve.request import SamplingParams
from serve.text.kv_cache import KVCache
from serve.text.runner import TokenRunner
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence
from serve.text.speculation.draft_model import DraftModel

torch.set_num_threads(1)
CPU = torch.device("cpu")
BLOCK = 8
PROMPTS = [list(range(40, 75)), [7, 30, 2, 99, 41], [*range(40, 72), 9], list(range(100, 120))]
names = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3")


class Lengths(RandomLength):
    """As many drafts a step as it is told; random numbers up to `most` unless it is."""

    fixed: int | None = None

    def choose(self, num_rows: int) -> int:
        return super().choose(num_rows) if self.fixed is None else self.fixed


def build(folder: Path, *, num_blocks: int = 100, most: int = 4, catch_up: int = 512, **options) -> tuple:
    target, draft = load_text_model(folder, device=CPU), load_text_model(folder, device=CPU)
    spec = target.spec
    cache = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, CPU)
    attentions = [make_attention("auto", cache, spec.num_heads) for _ in range(2)]
    proposer = DraftModel(draft, attentions[1], cache, num_blocks=num_blocks, max_num_tokens=catch_up)
    runner = TokenRunner(target, attentions[0], cache, num_blocks=num_blocks, proposer=proposer)
    lengths = Lengths(most)
    scheduler = TokenScheduler(
        KVCache(num_blocks, BLOCK), **{"max_num_seqs": 8, "max_num_batched_tokens": 512} | options,
        max_model_len=256, eos_token_ids=(), vocab_size=spec.vocab_size, draft_length=lengths,
    )  # fmt: skip
    return Engine(scheduler, runner), lengths


def sequence(prompt: list[int], num_output: int = 20) -> Sequence:
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0)
    return Sequence(id=f"job-{next(names)}", token_ids=list(prompt), num_prompt=len(prompt), sampling=sampling)


def run(engine: Engine, jobs: list[Sequence]) -> list[list[int]]:
    streams = [engine.submit(job) for job in jobs]
    while engine.step():
        pass
    return [[token for update in stream.take() for token in update.token_ids] for stream in streams]


def acceptance(jobs: list[Sequence]) -> float:
    return sum(job.num_accepted for job in jobs) / sum(job.num_drafted for job in jobs)


@pytest.fixture(scope="module")
def plain(folder) -> list[list[int]]:
    engine, lengths = build(folder)
    lengths.fixed = 0
    return run(engine, [sequence(prompt) for prompt in PROMPTS])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_blocks": 15}, {"max_num_batched_tokens": 8}, {"catch_up": 7}, {"max_num_seqs": 1}],
    ids=["roomy", "preempted", "small chunks", "slow catching up", "one by one"],
)
def test_every_draft_of_the_target_itself_holds(folder, plain, options):
    engine, _ = build(folder, **options)
    jobs = [sequence(prompt) for prompt in PROMPTS]
    assert run(engine, jobs) == plain
    assert sum(job.num_drafted for job in jobs) > 10 and acceptance(jobs) == 1.0
    if "num_blocks" in options:
        assert sum(job.num_preemptions for job in jobs) > 0


@pytest.mark.parametrize("drafts_before", [0, 3], ids=["the draft has not computed it", "the draft has computed it"])
def test_a_prefix_hit_of_the_target_is_made_good_in_the_draft(folder, plain, drafts_before):
    engine, lengths = build(folder)
    lengths.fixed = drafts_before
    run(engine, [sequence(PROMPTS[0])])
    lengths.fixed = 3
    again = [sequence(PROMPTS[0]), sequence(PROMPTS[2])]
    assert run(engine, again) == [plain[0], plain[2]]
    assert all(job.num_cached >= 32 for job in again) and acceptance(again) == 1.0


def test_a_prefix_that_both_models_have_is_not_computed_again(folder, monkeypatch):
    engine, lengths = build(folder)
    lengths.fixed = 3
    run(engine, [sequence(PROMPTS[0])])
    proposer = engine._runner._proposer
    computed: list[int] = []
    forward = proposer._forward
    monkeypatch.setattr(
        proposer, "_forward", lambda ids, num_new, *rest: computed.append(num_new[0]) or forward(ids, num_new, *rest)
    )
    run(engine, [sequence(PROMPTS[0], 6)])
    assert max(computed) <= len(PROMPTS[0]) - 32 + 1


def test_a_block_taken_over_and_given_back_is_computed_again(folder, plain):
    """The draft writes into blocks of others meanwhile, the target does not: their hashes alone tell."""
    engine, lengths = build(folder, num_blocks=8)
    for prompt, num_drafts in ((PROMPTS[0], 3), (PROMPTS[3], 3), (PROMPTS[0], 0), (PROMPTS[3], 0)):
        lengths.fixed = num_drafts
        run(engine, [sequence(prompt)])
    lengths.fixed = 3
    again = sequence(PROMPTS[0])
    assert run(engine, [again]) == [plain[0]] and acceptance([again]) == 1.0


def test_jobs_that_ended_leave_nothing(folder):
    engine, _ = build(folder)
    run(engine, [sequence(prompt) for prompt in PROMPTS])
    assert not engine._runner._proposer._cached
