"""A model on several ranks gives what it gives on one: families x features x splits, in float32 over gloo.

The table is the tests' ids: `test_equals_one_rank[2 ranks-llama-beams]`. Each split has one group of processes for all
of its cases. Memory is short and steps are small, so that prompts come in chunks and sequences are preempted.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_folder
from token_device import RandomLength

from models.parallel import ALONE, head_share, layer_range
from serve.errors import EngineDead, RequestFailed
from serve.options import ModelOptions, SpeculativeOptions
from serve.request import BeamParams, Grammar, SamplingParams
from serve.text.beams.group import BeamGroup
from serve.text.build import TextEngine, build_engine, start_ranks
from serve.text.build_ranks import Ranks
from serve.text.grammar.grammar import Cost, Matcher
from serve.text.grammar.source import to_llguidance
from serve.text.grammar.vocabulary import load_vocabulary
from serve.text.peers import Peers
from serve.text.sampling.sampler import Sampler
from serve.text.sequence import Sequence

torch.set_num_threads(1)
HAS_GRAMMARS = importlib.util.find_spec("llguidance") is not None
names = itertools.count()

SPLITS = {"2 ranks": (2, 1), "4 ranks": (4, 1), "2 stages": (1, 2), "2 x 2": (2, 2)}
"""Shards of a layer, stages. All families have two key/value heads, of which four ranks hold copies."""
BLOCK, NUM_LAYERS, NUM_KV_HEADS = 8, 2, 2
HEAD_DIM = {"llama": 16, "mistral": 16, "qwen2": 16, "qwen3": 32, "olmo2": 16}
PREFIX = list(range(40, 80))
PROMPTS = [
    [7, 30, 2, 99, 41, 41, 8, 5],
    [*PREFIX, 5, 6, 7],
    list(range(100, 157)),
    [*PREFIX, 9, 8],
    [11, 12] * 9,
    [3],
]


@pytest.fixture(scope="module", params=SPLITS)
def split(request) -> tuple[int, int]:
    return SPLITS[request.param]


@pytest.fixture(scope="module")
def ranks(split) -> Iterator[Ranks]:
    size, stages = split
    options = ModelOptions(model="any", threads=1, tensor_parallel_size=size, pipeline_parallel_size=stages)
    ranks = start_ranks(options)
    assert ranks is not None
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_folder(tmp_path_factory.mktemp("models"), family))


def build(
    folder: Path,
    ranks: Ranks | None = None,
    split: tuple[int, int] = (1, 1),
    *,
    depth: int | None = None,
    num_blocks: int = 16,
    drafts: bool = False,
    **values: Any,
) -> TextEngine:
    """An engine with so many blocks, however the model is split."""
    family = folder.name.removeprefix("tiny-")
    size, stages = split
    layers, heads = len(layer_range(NUM_LAYERS, 0, stages)), len(head_share(NUM_KV_HEADS, 0, size))
    position_bytes = 2 * HEAD_DIM[family] * 4 * (layers * heads + (NUM_LAYERS * NUM_KV_HEADS if drafts else 0))
    options = ModelOptions(
        model=str(folder),
        threads=1,
        block_size=BLOCK,
        kv_cache_memory_bytes=num_blocks * BLOCK * position_bytes,
        tensor_parallel_size=split[0],
        pipeline_parallel_size=split[1],
        **{"max_num_seqs": 8, "max_num_batched_tokens": 24, **values},
    )
    engine, _ = build_engine(options, progress=False, depth=depth, ranks=ranks)
    if engine.scheduler.draft_length is not None:
        engine.scheduler.draft_length = RandomLength(4, seed=3)
    return engine


# -- what is asked, feature by feature -----------------------------------------------------------------------------


def sequence(prompt: list[int], *, prompt_logprobs: int | None = None, matcher: Any = None, **params: Any) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **params})
    return Sequence(
        id=f"job-{next(names)}",
        token_ids=list(prompt),
        num_prompt=len(prompt),
        sampling=sampling,
        prompt_logprobs=prompt_logprobs,
        matcher=matcher,
    )


def constrained(folder: Path, prompt: list[int], **params: Any) -> Sequence:
    config = json.loads((folder / "config.json").read_text())
    vocabulary = load_vocabulary(folder, config["vocab_size"], [config["eos_token_id"]])
    core = vocabulary.matcher(
        to_llguidance(
            "regex", "(red|green|blue)( and (one|two|three)){2,4}", is_compact=False, special=vocabulary.special
        )
    )
    sampling = SamplingParams(**{"max_tokens": 40, "grammar": Grammar(kind="regex"), **params})
    one = sequence(prompt, matcher=Matcher(core, vocabulary, sampling, Cost()))
    one.sampling = sampling
    return one


def beam_group(prompt: list[int], **beams: Any) -> BeamGroup:
    params = BeamParams(**beams)
    sampling = SamplingParams(
        max_tokens=10, ignore_eos=True, beams=params, logprobs=0 if "num_beam_groups" not in beams else None
    )
    return BeamGroup(
        id=f"beams-{next(names)}",
        token_ids=list(prompt),
        num_prompt=len(prompt),
        sampling=sampling,
        num_returned=2,
    )


@dataclass(frozen=True)
class Feature:
    jobs: Callable[[Path], list[Sequence]]
    options: dict[str, Any] = field(default_factory=dict)
    drafts_from_itself: bool = False
    used: Callable[[list[Sequence]], bool] = lambda jobs: True
    """Whether the jobs, when done, show that the feature was in use."""


def greedy(folder: Path) -> list[Sequence]:
    return [sequence(prompt) for prompt in PROMPTS]


def sampled(folder: Path) -> list[Sequence]:
    return [sequence(prompt, temperature=0.9, seed=i) for i, prompt in enumerate(PROMPTS)]


def shaped(folder: Path) -> list[Sequence]:
    """Penalties, filters, biases and n: choices of one prompt with seeds one after the other."""
    shapes: list[dict[str, Any]] = [
        {"top_p": 0.9, "repetition_penalty": 1.2},
        {"top_k": 20, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"min_p": 0.05, "logit_bias": ((17, 4.0),)},
    ]
    return [
        sequence(PROMPTS[i], temperature=1.0, seed=10 * i + choice, **shape)
        for i, shape in enumerate(shapes)
        for choice in range(3)
    ]


def verified(jobs: list[Sequence]) -> bool:
    return sum(job.num_drafted for job in jobs) > 0


FEATURES = {
    "chunks and preemption": Feature(greedy, used=lambda jobs: sum(job.num_preemptions for job in jobs) > 0),
    "prefix cache": Feature(
        greedy, {"num_blocks": 60}, used=lambda jobs: sum(job.num_cached for job in jobs) >= len(PREFIX)
    ),
    "sampling, penalties, n": Feature(shaped),
    "roomy": Feature(sampled, {"num_blocks": 60}),
    "logprobs": Feature(
        lambda folder: [
            sequence(prompt, prompt_logprobs=1, logprobs=2, temperature=0.8, seed=i)
            for i, prompt in enumerate(PROMPTS[:4])
        ]
    ),
    "structured output": Feature(
        lambda folder: [
            *(constrained(folder, prompt, temperature=1.0, seed=i) for i, prompt in enumerate(PROMPTS[:3])),
            sequence(PROMPTS[4]),
        ]
    ),
    "beams": Feature(
        lambda folder: [beam_group(PROMPTS[0], num_beams=3), sequence(PROMPTS[2]), beam_group(PREFIX, num_beams=2)],
        {"num_blocks": 24},
    ),
    "group beams": Feature(
        lambda folder: [beam_group(PROMPTS[4], num_beams=4, num_beam_groups=2, diversity_penalty=0.5)]
    ),
    "drafts by ngram": Feature(sampled, {"speculative_config": SpeculativeOptions(method="ngram")}),
    "drafts by a model": Feature(sampled, drafts_from_itself=True, used=verified),
    "drafts by a model, rejection sampling": Feature(
        greedy,
        {"speculative_config": {"rejection_sample_method": "standard"}},
        drafts_from_itself=True,
        used=verified,
    ),
}

CASES = [
    *(("llama", feature) for feature in FEATURES if feature != "roomy"),
    *((family, "chunks and preemption") for family in ("mistral", "qwen2", "qwen3")),
    ("olmo2", "roomy"),
]


def run(engine: TextEngine, jobs: list[Sequence]) -> list[Any]:
    """What everybody gets: tokens and reasons, and all numbers beside them, in order."""
    streams = [engine.submit(job) for job in jobs]
    while engine.step():
        pass
    engine.check_health()
    return [told(stream.take(), stream.finish_reason) for stream in streams]


def told(updates: list[Any], reason: Any) -> tuple[Any, list[float]]:
    exact: list[Any] = [reason]
    numbers: list[float] = []
    for update in updates:
        for hypothesis in getattr(update, "hypotheses", ()):
            exact.append(tuple(node.token_id for node in hypothesis.node.path(0)))
            numbers.append(hypothesis.score)
        exact += getattr(update, "token_ids", ())
        for entry in (*(getattr(update, "logprobs", None) or ()), *(getattr(update, "prompt_logprobs", None) or ())):
            if entry is not None:
                exact.append((entry.token_id, entry.rank))
                numbers += [entry.logprob, *(logprob for _, logprob in entry.top)]
    return exact, numbers


def case_options(feature: Feature, folder: Path) -> dict[str, Any]:
    options = dict(feature.options)
    if feature.drafts_from_itself:
        speculation = options.get("speculative_config", {})
        options["speculative_config"] = SpeculativeOptions(model=str(folder), **speculation)
    return options


@pytest.fixture(scope="session")
def on_one_rank(folders) -> Callable[[str, str], list[Any]]:
    @cache
    def compute(family: str, name: str) -> list[Any]:
        feature, folder = FEATURES[name], folders(family)
        jobs = feature.jobs(folder)
        outputs = run(build(folder, drafts=feature.drafts_from_itself, **case_options(feature, folder)), jobs)
        assert feature.used(jobs), "the case does not show what it is for"
        return outputs

    return compute


@pytest.mark.parametrize("family, name", CASES, ids=["-".join(case) for case in CASES])
def test_equals_one_rank(ranks, split, folders, on_one_rank, family, name):
    if name == "structured output" and not HAS_GRAMMARS:
        pytest.skip("llguidance is not here")
    if family == "olmo2" and split[1] > 1:
        pytest.skip("transformers runs its layers, which cannot be cut into stages")
    feature, folder = FEATURES[name], folders(family)
    jobs = feature.jobs(folder)
    engine = build(folder, ranks, split, drafts=feature.drafts_from_itself, **case_options(feature, folder))
    for (exact, numbers), (expected, expected_numbers) in zip(
        run(engine, jobs), on_one_rank(family, name), strict=True
    ):
        assert exact == expected
        assert numbers == pytest.approx(expected_numbers, abs=1e-4)  # sums of shards are rounded in another order
    assert engine.load().memory == 0.0
    assert feature.used(jobs)


@pytest.mark.parametrize("name", ["chunks and preemption", "sampling, penalties, n"])
def test_tokens_that_only_the_driver_s_device_knows_reach_the_other_ranks(ranks, split, folders, on_one_rank, name):
    """Steps that overlap, as on CUDA: with depth 1 and no stages a step is told before the last one's tokens are."""
    if split[1] > 1:
        pytest.skip("no token is in flight between stages")
    folder = folders("llama")
    engine = build(folder, ranks, split, depth=1)
    assert run(engine, FEATURES[name].jobs(folder)) == on_one_rank("llama", name)


class LostGroup:
    """A group whose other ranks are gone."""

    def __init__(self, failure: Exception | None):
        self.failure = failure

    def tell(self, payload: memoryview) -> None:
        if self.failure is not None:
            raise self.failure

    def explain(self, error: Exception) -> Exception:
        return self.failure or error


@pytest.mark.parametrize(
    "failure, words",
    [(None, "on the driver: a fault of its own"), (EngineDead("rank 1: its own words"), "rank 1: its own words")],
)
def test_a_step_that_fails_when_it_was_told_ends_the_engine_with_its_cause(
    folders, monkeypatch, caplog, failure, words
):
    engine = build(folders("llama"))
    monkeypatch.setattr(engine._runner, "peers", Peers(LostGroup(failure), ALONE, max_num_seqs=8, block_size=BLOCK))
    if failure is None:
        monkeypatch.setattr(engine._runner.model, "forward", Mock(side_effect=ValueError("a fault of its own")))
    stream = engine.submit(sequence(PROMPTS[0]))
    while engine.step():
        pass
    with pytest.raises(EngineDead, match="DeviceFault"):
        stream.take()
    assert words in caplog.text


def test_a_request_that_cannot_be_sampled_fails_alone(ranks, split, folders, monkeypatch):
    """Sampling is the driver's own: the ranks are in step before and after, and the others get their tokens."""
    folder = folders("llama")
    engine, alone = build(folder, ranks, split), build(folder)
    bad, prompts = PROMPTS[4], [PROMPTS[0], PROMPTS[5]]
    expected = run(alone, [sequence(prompt) for prompt in prompts])
    original = Sampler.sample

    def sample(self: Sampler, logits_RV: torch.Tensor, plan: Any, *rest: Any, **named: Any) -> Any:
        if any(row.job.token_ids[: len(bad)] == bad for row in plan.rows):
            raise ValueError("this row cannot be sampled")
        return original(self, logits_RV, plan, *rest, **named)

    monkeypatch.setattr(Sampler, "sample", sample)
    streams = [engine.submit(sequence(prompt)) for prompt in (*prompts, bad)]
    while engine.step():
        pass
    with pytest.raises(RequestFailed):
        streams.pop().take()
    assert [told(stream.take(), stream.finish_reason) for stream in streams] == expected
    engine.check_health()


def test_every_rank_says_what_it_holds(ranks, split, folders):
    size, stages = split
    options = ModelOptions(
        model=str(folders("llama")),
        threads=1,
        kv_cache_memory_bytes=1 << 20,
        tensor_parallel_size=size,
        pipeline_parallel_size=stages,
    )
    _, card = build_engine(options, progress=False, ranks=ranks)
    _, alone = build_engine(replace(options, tensor_parallel_size=1, pipeline_parallel_size=1), progress=False)
    assert alone.ranks == ()
    assert [(part.rank, part.device) for part in card.ranks] == [(rank, "cpu") for rank in range(size * stages)]
    assert min(part.kv_cache_tokens for part in card.ranks) == card.kv_cache_tokens
    whole = 4 * card.num_parameters
    assert all(whole / size / stages * 0.5 < part.weight_bytes < whole / size / stages * 1.6 for part in card.ranks)
    assert all(part.bytes_read == part.weight_bytes for part in card.ranks), "float32 as stored, each only its slices"
