"""Beams through the engine on real (tiny) models: transformers' ids and scores, whatever the memory, chunks and mates.

All cases run at once, in the same batches as sequences that draw.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from beams import Found, frozen_tokens
from group_beams import FILE, PAD, PAD_BIAS, make_model
from tiny import tiny_folder, tiny_model

from serve.errors import ContextTooLong, InvalidRequest
from serve.events import FinishReason
from serve.options import ModelOptions
from serve.request import BeamParams, SamplingParams
from serve.text.beams.group import BeamGroup
from serve.text.build import TextEngine, build_engine
from serve.text.sequence import Sequence

torch.set_num_threads(1)
BLOCK_BYTES = {"llama": 2 * 2 * 8 * 2 * 16 * 4, "qwen3": 2 * 2 * 8 * 2 * 32 * 4}
"""Keys and values of 8 positions: 2 layers, 2 heads of 16 or 32, float32."""
NUM_CASES = 24
SETTINGS = {
    "roomy": {},
    "overlapping steps": {"depth": 1},
    "small chunks": {"max_num_seqs": 8, "max_num_batched_tokens": 8},
    "little memory": {"num_blocks": 40, "max_num_batched_tokens": 64},
    "little memory, no prefix cache": {"num_blocks": 40, "enable_prefix_caching": False, "depth": 1},
}
names = itertools.count()
FROZEN = json.loads(FILE.read_text(encoding="utf-8"))


@dataclass
class Case:
    prompt: list[int]
    max_tokens: int
    end_ids: list[int]
    beams: BeamParams
    options: dict[str, float]
    expected: list[tuple[list[int], float]]

    def group(self) -> BeamGroup:
        sampling = SamplingParams(
            max_tokens=self.max_tokens,
            stop_token_ids=tuple(self.end_ids),
            ignore_eos=True,
            beams=self.beams,
            **self.options,
        )
        return group(self.prompt, sampling)


def group(prompt: list[int], sampling: SamplingParams, num_returned: int | None = None) -> BeamGroup:
    assert sampling.beams is not None
    return BeamGroup(
        id=f"beams-{next(names)}",
        token_ids=list(prompt),
        num_prompt=len(prompt),
        sampling=sampling,
        num_returned=sampling.beams.num_beams if num_returned is None else num_returned,
    )


def plain(prompt: list[int], max_tokens: int) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, seed=len(prompt), ignore_eos=True)
    return Sequence(id=f"plain-{next(names)}", token_ids=list(prompt), num_prompt=len(prompt), sampling=sampling)


def random_case(model: Any, rng: random.Random) -> Case:
    """With transformers' answer. End tokens are such as come up."""
    vocab = model.config.vocab_size
    prompt = [7] * rng.choice([0, 0, 20]) + [rng.randrange(vocab) for _ in range(rng.randint(1, 12))]
    ids = torch.tensor([prompt])
    fixed = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    likely = model.generate(ids, max_new_tokens=12, num_beams=3, eos_token_id=None, **fixed)[0, len(prompt) :].tolist()
    end_ids = sorted(rng.sample(sorted(set(likely)), min(len(set(likely)), rng.choice([0, 1, 2, 3]))))
    beams = BeamParams(
        num_beams=rng.choice([2, 2, 3, 4, 6]),
        length_penalty=rng.choice([1.0, 1.0, 0.0, 0.6, 2.0, -1.0]),
        early_stopping=rng.choice([True, False, "never"]),
    )
    max_tokens = rng.randint(1, 20)
    options: dict[str, float] = {}
    if rng.random() < 0.3:
        options["repetition_penalty"] = rng.choice([1.3, 0.8])
    theirs = dict(options)
    if end_ids and rng.random() < 0.3:
        options["min_tokens"] = theirs["min_new_tokens"] = min(3, max_tokens)
    answer = model.generate(
        ids,
        max_new_tokens=max_tokens,
        num_beams=beams.num_beams,
        num_return_sequences=beams.num_beams,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        eos_token_id=end_ids or None,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **fixed,
        **theirs,
    )
    lengths = [int((indices >= 0).sum()) for indices in answer.beam_indices]
    tokens = [row[len(prompt) :][:length].tolist() for row, length in zip(answer.sequences, lengths)]
    return Case(prompt, max_tokens, end_ids, beams, options, list(zip(tokens, answer.sequences_scores.tolist())))


@pytest.fixture(scope="module", params=("llama", "qwen3"))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def cases(family) -> list[Case]:
    rng, model = random.Random(5), tiny_model(family)
    return [random_case(model, rng) for _ in range(NUM_CASES)]


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), family)


def build(folder: Path, *, num_blocks: int = 400, block_bytes: int = 0, depth: int = 0, **values) -> TextEngine:
    size = block_bytes or BLOCK_BYTES[folder.name.removeprefix("tiny-")]
    options = ModelOptions(
        model=str(folder),
        threads=1,
        block_size=8,
        kv_cache_memory_bytes=size * num_blocks,
        **{"max_num_seqs": 32, **values},
    )
    return build_engine(options, progress=False, depth=depth)[0]


def run(engine: TextEngine, jobs: list[Sequence]) -> list[list[Found]]:
    """The hypotheses of the groups among `jobs`; every block is free afterwards."""
    streams = [engine.submit(job) for job in jobs]
    while engine.step():
        pass
    cache = engine.scheduler.kv_cache
    assert cache.num_free == cache.num_blocks
    updates = [(job, stream.take()) for job, stream in zip(jobs, streams)]
    return [[Found.of(h) for h in update[-1].hypotheses] for job, update in updates if isinstance(job, BeamGroup)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_beams_are_transformers_beams(folder, cases, setting):
    engine = build(folder, **SETTINGS[setting])
    jobs: list[Sequence] = [case.group() for case in cases]
    mates = [plain(list(range(30, 30 + length)), 30) for length in (3, 17, 9, 25)]
    found = run(engine, [*jobs, *mates])
    for case, hypotheses in zip(cases, found, strict=True):
        assert [list(hypothesis.tokens) for hypothesis in hypotheses] == [tokens for tokens, _ in case.expected]
        # sums of up to 20 float32 log-probabilities whose logits differ in their last bits, times length ** penalty
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in case.expected], rel=1e-4, abs=1e-4)
    if "memory" in setting:
        assert sum(job.num_preemptions for job in jobs) > 0
    assert all(mate.num_output == 30 for mate in mates)


@pytest.mark.parametrize("case", FROZEN[:8], ids=range(8))
def test_groups_are_those_of_transformers_4(case, tmp_path):
    make_model(case["seed"], case["scale"]).save_pretrained(tmp_path)
    engine = build(tmp_path, block_bytes=2 * 2 * 8 * 2 * 8 * 4)
    names = ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
    sampling = SamplingParams(
        max_tokens=case["max_tokens"],
        stop_token_ids=tuple(case["end_ids"]),
        ignore_eos=True,
        logit_bias=((PAD, PAD_BIAS),),
        beams=BeamParams(**{name: case[name] for name in names}),
    )
    (hypotheses,) = run(engine, [group(case["prompt"], sampling)])
    assert frozen_tokens(case, hypotheses) == [hypothesis["tokens"] for hypothesis in case["hypotheses"]]
    assert [h.score for h in hypotheses] == pytest.approx([h["score"] for h in case["hypotheses"]], rel=1e-5)


def test_copied_prompt_blocks_are_cached_for_others(folder, cases):
    engine = build(folder)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, beams=BeamParams(num_beams=3))
    prompt = list(range(50, 80))
    first, again = group(prompt, sampling), group(prompt, sampling)
    assert run(engine, [first]) == run(engine, [again])
    assert (first.num_cached, again.num_cached) == (0, 24)


def test_a_cancelled_group_gives_everything_back(folder):
    engine = build(folder)
    sampling = SamplingParams(max_tokens=50, ignore_eos=True, beams=BeamParams(num_beams=4))
    stream = engine.submit(group(list(range(20)), sampling))
    for _ in range(9):
        engine.step()
    cache = engine.scheduler.kv_cache
    assert cache.num_free < cache.num_blocks
    stream.cancel()
    engine.step()
    assert stream.finish_reason is FinishReason.CANCELLED
    assert cache.num_free == cache.num_blocks


@pytest.mark.parametrize(
    ("num_beams", "prompt", "error", "says"),
    [
        (9, 10, InvalidRequest, "num_beams is 9, more than the 8 sequences"),
        (
            8,
            60,
            ContextTooLong,
            "8 beams of 60 prompt tokens and max_tokens 24 may need 39 blocks of 8 positions, more",
        ),
    ],
)
def test_a_group_that_can_never_fit_is_refused_with_the_numbers(folder, num_beams, prompt, error, says):
    engine = build(folder, num_blocks=30, max_num_seqs=8)
    sampling = SamplingParams(max_tokens=24, beams=BeamParams(num_beams=num_beams))
    with pytest.raises(error, match=says):
        engine.submit(group(list(range(prompt)), sampling))
