"""The text engine as a whole, in-process: transformers' tokens whatever the memory, chunks, mates and failures."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_model

from serve.engine.stream import Stream
from serve.errors import RequestFailed
from serve.events import FinishReason
from serve.options import ModelOptions
from serve.request import SamplingParams
from serve.text.build import TextEngine, build_engine
from serve.text.sequence import Sequence

torch.set_num_threads(1)
BLOCK_BYTES = {"llama": 2 * 2 * 8 * 2 * 16 * 4, "qwen3": 2 * 2 * 8 * 2 * 32 * 4}
"""Keys and values of 8 positions: 2 layers, 2 heads of 16 or 32, float32."""
FAMILIES = ("llama", "qwen3")
PREFIX = list(range(40, 80))
PROMPTS = [
    [7, 30, 2, 99, 41, 41, 8, 5],
    [1, 2, 3],
    [*PREFIX, 5, 6, 7],
    [200],
    [*PREFIX, 9, 8],
    list(range(100, 157)),
    [*PREFIX, 5, 6, 7],
    [11, 12] * 9,
]
NUM_OUTPUT = 24
SETTINGS = {
    "roomy": {},
    "small chunks": {"max_num_seqs": 8, "max_num_batched_tokens": 8},
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 5},
    "little memory": {"num_blocks": 14, "max_num_batched_tokens": 64, "max_num_seqs": 8},
    "little memory, small chunks": {"num_blocks": 12, "max_num_seqs": 8, "max_num_batched_tokens": 8},
    "no prefix cache": {"enable_prefix_caching": False},
}
names = itertools.count()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), family)


@pytest.fixture(scope="module")
def expected(family) -> list[list[int]]:
    """transformers' greedy continuations, one prompt at a time."""
    model = tiny_model(family)
    return [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_OUTPUT, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def build(folder: Path, *, num_blocks: int = 200, depth: int = 0, **values) -> TextEngine:
    size = BLOCK_BYTES[folder.name.removeprefix("tiny-")] * num_blocks
    options = ModelOptions(
        model=str(folder),
        threads=1,
        block_size=8,
        kv_cache_memory_bytes=size,
        **{"max_num_seqs": 32, **values},
    )
    return build_engine(options, progress=False, depth=depth)[0]


def sequence(prompt: list[int], *, prompt_logprobs: int | None = None, **params) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": NUM_OUTPUT, "temperature": 0.0, "ignore_eos": True, **params})
    return Sequence(
        id=f"job-{next(names)}",
        token_ids=list(prompt),
        num_prompt=len(prompt),
        sampling=sampling,
        prompt_logprobs=prompt_logprobs,
    )


def run(engine: TextEngine, sequences: list[Sequence]) -> list[Stream[Sequence]]:
    streams = [engine.submit(seq) for seq in sequences]
    while engine.step():
        pass
    return streams


def tokens(stream: Stream[Sequence]) -> list[int]:
    return [token for update in stream.take() for token in update.token_ids]


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_are_transformers_tokens(folder, expected, setting):
    engine = build(folder, **SETTINGS[setting])
    sequences = [sequence(prompt) for prompt in PROMPTS]
    streams = run(engine, sequences)
    assert [tokens(stream) for stream in streams] == expected
    if "memory" in setting:
        assert sum(seq.num_preemptions for seq in sequences) > 0
    if setting == "roomy":
        again = [sequence(prompt) for prompt in PROMPTS]
        assert [tokens(stream) for stream in run(engine, again)] == expected
        assert sum(seq.num_cached for seq in again) > 100


KINDS = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2},
    {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    {"temperature": 1.0, "logit_bias": ((17, 4.0),), "logprobs": 2},
]


def test_sampled_tokens_are_the_same_alone_in_a_batch_after_preemption_and_in_a_new_engine(folder):
    def requests() -> list[Sequence]:
        return [sequence(prompt, seed=100 + i, **KINDS[i % len(KINDS)]) for i, prompt in enumerate(PROMPTS)]

    roomy = build(folder)
    alone = [tokens(run(roomy, [seq])[0]) for seq in requests()]
    assert len({tuple(output) for output in alone}) == len(PROMPTS)
    for setting in SETTINGS:
        batch = requests()
        assert [tokens(stream) for stream in run(build(folder, **SETTINGS[setting]), batch)] == alone, setting
        if "memory" in setting:
            assert sum(seq.num_preemptions for seq in batch) > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_that_overlap_change_no_token(folder, expected, setting):
    """Depth 1 on CPU: steps are scheduled before the last one's tokens are known, as on a GPU."""
    engine = build(folder, depth=1, **SETTINGS[setting])
    greedy = [sequence(prompt) for prompt in PROMPTS]
    sampled = [sequence(prompt, seed=i, **KINDS[i % len(KINDS)]) for i, prompt in enumerate(PROMPTS)]
    alone = [sequence(prompt, seed=i, **KINDS[i % len(KINDS)]) for i, prompt in enumerate(PROMPTS)]
    streams = run(engine, [seq for pair in zip(greedy, sampled) for seq in pair])
    assert [tokens(stream) for stream in streams[::2]] == expected
    assert [tokens(stream) for stream in streams[1::2]] == [tokens(run(build(folder), [seq])[0]) for seq in alone]
    assert engine.load().memory == 0.0


def test_another_seed_gives_another_text(folder):
    engine = build(folder)
    outputs = [tokens(stream) for stream in run(engine, [sequence([5, 6], seed=i, temperature=1.0) for i in range(6)])]
    assert len({tuple(output) for output in outputs}) == 6


@pytest.mark.parametrize("setting", ["roomy", "small chunks", "little memory, small chunks"])
def test_prompt_logprobs_are_transformers(folder, family, setting):
    engine = build(folder, **SETTINGS[setting])
    streams = run(engine, [sequence(prompt, prompt_logprobs=1, max_tokens=4) for prompt in PROMPTS])
    model = tiny_model(family)
    for prompt, stream in zip(PROMPTS, streams):
        scored = [update.prompt_logprobs for update in stream.take() if update.prompt_logprobs is not None]
        assert len(scored) == 1
        with torch.no_grad():
            theirs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert scored[0][0] is None and len(scored[0]) == len(prompt)
        for position, entry in enumerate(scored[0][1:]):
            assert entry.token_id == prompt[position + 1]
            assert entry.logprob == pytest.approx(float(theirs[position, entry.token_id]), abs=2e-4)


def test_logprobs_come_with_the_tokens_they_describe(folder):
    engine = build(folder)
    (stream,) = run(engine, [sequence([7, 30, 2], logprobs=3, max_tokens=5)])
    updates = stream.take()
    assert [update.logprobs[0].token_id for update in updates] == [update.token_ids[0] for update in updates]
    assert all(update.logprobs[0].rank == 1 and len(update.logprobs[0].top) == 3 for update in updates)


def test_the_end_token_stops_and_is_not_delivered(folder, expected):
    stop = expected[0][5]
    first = expected[0].index(stop)
    engine = build(folder)
    (stream,) = run(engine, [sequence(PROMPTS[0], stop_token_ids=(stop,))])
    assert tokens(stream) == expected[0][:first]
    assert stream.finish_reason is FinishReason.STOP and stream.job.stop_token_id == stop


POISON = 250


@pytest.fixture(scope="module")
def poisoned_folder(tmp_path_factory) -> Path:
    """A llama in which one token's embedding is NaN: whoever reads it has no logits."""
    folder = tiny_folder(tmp_path_factory.mktemp("poisoned"), "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("setting", ["roomy", "small chunks", "little memory, small chunks"])
def test_a_poisoned_request_fails_alone_and_its_mates_get_their_tokens(poisoned_folder, setting):
    engine = build(poisoned_folder, **SETTINGS[setting])
    mates = [prompt for prompt in PROMPTS if POISON not in prompt]
    alone = [tokens(run(build(poisoned_folder), [sequence(prompt)])[0]) for prompt in mates]
    poison = sequence([3, 4, POISON, *range(20), 5])
    streams = run(engine, [sequence(mates[0]), poison, *(sequence(prompt) for prompt in mates[1:])])
    bad = streams.pop(1)
    assert [tokens(stream) for stream in streams] == alone
    with pytest.raises(RequestFailed):
        bad.take()
    assert bad.finish_reason is FinishReason.ERROR
    assert [tokens(stream) for stream in run(engine, [sequence(prompt) for prompt in mates])] == alone
    engine.check_health()
    assert engine.load().running == 0 and engine.load().memory == 0.0
