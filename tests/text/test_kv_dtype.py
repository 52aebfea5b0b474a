"""A KV cache of one byte a number: nearly the model's own answers, and the same ones whatever happens to the cache."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from paged import PagedModel, cache_spec
from tiny import tiny_folder

from models.attention.base import KVCacheSpec
from models.attention.build import make_attention
from models.registry import load_text_model
from serve.errors import ConfigError
from serve.options import ModelOptions
from serve.request import SamplingParams
from serve.text.build import TextEngine, build_engine
from serve.text.sequence import Sequence

torch.set_num_threads(1)
CPU = torch.device("cpu")
KINDS = ("fp8", "int8")
PREFIX = list(range(40, 80))
PROMPTS = [
    [7, 30, 2, 99, 41, 41, 8, 5],
    [*PREFIX, 5, 6, 7],
    [200],
    [*PREFIX, 9, 8],
    list(range(100, 157)),
    [11, 12] * 9,
]
NUM_OUTPUT = 16
SETTINGS = {
    "small chunks": {"max_num_seqs": 8, "max_num_batched_tokens": 8},
    "little memory": {"num_blocks": 14, "max_num_batched_tokens": 64, "max_num_seqs": 8},
    "no prefix cache": {"enable_prefix_caching": False},
}
names = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3")


def block_bytes(kind: str) -> int:
    return KVCacheSpec(2, 2, 32, 8, torch.float32, CPU, "fp8_e4m3" if kind == "fp8" else kind).block_bytes


def build(folder, kind: str, *, num_blocks: int = 200, **values) -> TextEngine:
    options = ModelOptions(
        model=str(folder),
        threads=1,
        block_size=8,
        kv_cache_dtype=kind,
        kv_cache_memory_bytes=num_blocks * block_bytes(kind),
        **{"max_num_seqs": 32, **values},
    )
    return build_engine(options, progress=False)[0]


def answers(engine: TextEngine, **params) -> tuple[list[list[int]], list[Sequence]]:
    sampling = SamplingParams(**{"max_tokens": NUM_OUTPUT, "temperature": 0.0, "ignore_eos": True, **params})
    sequences = [
        Sequence(id=f"job-{next(names)}", token_ids=list(prompt), num_prompt=len(prompt), sampling=sampling)
        for prompt in PROMPTS
    ]
    streams = [engine.submit(seq) for seq in sequences]
    while engine.step():
        pass
    return [[token for update in stream.take() for token in update.token_ids] for stream in streams], sequences


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_chunks_preemption_or_cached_prefixes(folder, kind):
    engine = build(folder, kind)
    expected, _ = answers(engine)
    again, sequences = answers(engine)
    assert again == expected and sum(seq.num_cached for seq in sequences) > 100
    for setting, values in SETTINGS.items():
        found, sequences = answers(build(folder, kind, **values))
        assert found == expected, setting
        assert setting != "little memory" or sum(seq.num_preemptions for seq in sequences) > 0


@pytest.mark.parametrize(("kind", "most"), [("fp8_e4m3", 0.1), ("int8", 0.03)])
def test_logits_stay_near_those_of_an_exact_cache(folder, kind, most):
    """As a share of their spread. A number of a key or value is wrong by up to 1/16 of it in fp8, 1/254 of the row's
    largest in int8; 8 tokens in chunks, a model of two layers."""
    model = load_text_model(folder, device=CPU)
    spec = replace(cache_spec(model.rank_spec), kv_dtype=kind)
    exact, quantised = (
        PagedModel(model, attention) for attention in ("sdpa", make_attention("sdpa", spec, model.rank_spec.num_heads))
    )
    for tokens in ([7, 30, 2, 99, 41], [8], [5, 77]):
        wanted, found = (paged.step({"a": tokens})["a"] for paged in (exact, quantised))
        assert float((found - wanted).std() / wanted.std()) < most


def test_one_byte_a_number_holds_more_positions_in_the_same_memory(folder):
    sizes = {}
    for kind in ("auto", "fp8"):
        options = ModelOptions(model=str(folder), threads=1, kv_cache_dtype=kind, kv_cache_memory_bytes=1 << 19)
        sizes[kind] = build_engine(options, progress=False)[1].kv_cache_tokens
    assert sizes["fp8"] / sizes["auto"] == pytest.approx(32 * 4 / (32 + 4), rel=0.05)


def test_a_backend_that_cannot_is_refused_with_the_option_that_named_it(folder):
    with pytest.raises(ConfigError, match=r"attention_backend: .* 'cpu' keeps no KV cache in int8") as refused:
        build(folder, "int8", attention_backend="cpu")
    assert refused.value.param == "attention_backend"


@pytest.mark.parametrize("kind", ["auto", "fp8_e4m3", "int8"])
def test_copied_blocks_hold_what_was_copied(kind):
    spec = KVCacheSpec(2, 2, 16, 4, torch.float32, CPU, kind)
    attention = make_attention("sdpa", spec, 4)
    kv = attention.allocate(6)
    for layer in kv:
        layer.copy_(torch.randint(0, 200, layer.shape))
    attention.copy_blocks(kv, torch.tensor([0, 3]), torch.tensor([5, 1]))
    for layer in kv:
        blocks = layer.unflatten(1, (6, 4))
        assert torch.equal(blocks[:, 5], blocks[:, 0]) and torch.equal(blocks[:, 1], blocks[:, 3])
