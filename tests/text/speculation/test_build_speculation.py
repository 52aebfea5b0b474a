"""Speculation from options: what is built, what is refused by name, and that the default changes no token."""

from __future__ import annotations

import itertools
import json

import pytest
from tiny import tiny_folder

from serve.config import parse_config, parse_value
from serve.errors import ConfigError
from serve.options import ModelOptions, SpeculativeOptions
from serve.request import SamplingParams
from serve.text.build import build_engine
from serve.text.sequence import Sequence
from serve.text.speculation.build import speculation_of

names = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models"), "llama")


def engine(target, **speculation):
    options = ModelOptions(
        model=str(target),
        threads=1,
        kv_cache_memory_bytes=4 << 20,
        speculative_config=SpeculativeOptions(**speculation) if speculation else None,
    )
    return build_engine(options, progress=False)


def outputs(built, prompts, **sampling) -> list[list[int]]:
    streams = [
        built.submit(
            Sequence(
                id=f"job-{next(names)}",
                token_ids=list(prompt),
                num_prompt=len(prompt),
                sampling=SamplingParams(**{"max_tokens": 48, "temperature": 0.0, "ignore_eos": True, **sampling}),
            )
        )
        for prompt in prompts
    ]
    while built.step():
        pass
    return [[token for update in stream.take() for token in update.token_ids] for stream in streams]


PROMPTS = [[7, 30, 2, 99], [5, 6] * 8, list(range(100, 130))]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_every_method_gives_the_tokens_of_none(folder, method, sampling):
    speculation = {"method": "ngram"} if method == "ngram" else {"model": str(folder)}
    plain, card = engine(folder)
    speculating, smaller = engine(folder, num_speculative_tokens=3, **speculation)
    assert outputs(speculating, PROMPTS, **sampling) == outputs(plain, PROMPTS, **sampling)
    acceptance = speculating.scheduler.draft_length.acceptance
    assert acceptance.num_drafted > 0 or (method == "ngram" and sampling), "random text repeats nothing"
    halved = 2 if method == "draft_model" else 1
    assert smaller.kv_cache_tokens == card.kv_cache_tokens // halved // 16 * 16, "both caches share the memory"


def test_a_draft_with_another_vocabulary_is_refused_by_name(folder, tmp_path):
    other = tiny_folder(tmp_path, "qwen3", vocab_size=512)
    with pytest.raises(ConfigError, match=r"speculative_config\.model: 'tiny-qwen3' has a vocabulary of 512 tokens"):
        engine(folder, model=str(other))
    same_size = tiny_folder(tmp_path / "b", "qwen3")
    tokenizer = json.loads((same_size / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    (a, b), (one, two) = list(vocab)[:2], list(vocab.values())[:2]
    vocab[a], vocab[b] = two, one
    (same_size / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="different tokenizers"):
        engine(folder, model=str(same_size))


def test_a_draft_that_is_not_there_is_refused_by_key():
    with pytest.raises(ConfigError, match=r"^speculative_config\.model: 'no-such-model'"):
        engine("tandem-text", model="no-such-model")


def test_only_the_embedded_model_speculates_by_default(folder):
    assert speculation_of(ModelOptions(model="tandem-text")).model == "tandem-text-draft"
    assert speculation_of(ModelOptions(model=str(folder))) is None
    off = SpeculativeOptions(num_speculative_tokens=0)
    assert speculation_of(ModelOptions(model="tandem-text", speculative_config=off)) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, r"models\[0\]\.speculative_config\.model is missing; name the draft model"),
        ({"metod": "ngram"}, r"models\[0\]\.speculative_config\.metod: unknown key; did you mean 'method'"),
        ({"method": "magic"}, r"models\[0\]\.speculative_config\.method: 'magic' is not one of"),
        ({"method": "ngram", "num_speculative_tokens": 99}, r"num_speculative_tokens is 99; give a value from 0 to 16"),
        ({"method": "ngram", "model": "a"}, r"model is 'a', but method ngram needs none"),
        ({"method": "ngram", "prompt_lookup_min": 5}, r"prompt_lookup_min is 5, above prompt_lookup_max \(4\)"),
    ],
)
def test_what_is_wrong_is_told_with_path_value_and_remedy(value, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config({"models": [{"model": "m", "speculative_config": value}]})


def test_the_flag_takes_json():
    text = '{"model": "tandem-text-draft", "num_speculative_tokens": 3}'
    options = parse_value(SpeculativeOptions, "--speculative-config", text)
    assert options == SpeculativeOptions(model="tandem-text-draft", num_speculative_tokens=3)
    with pytest.raises(ConfigError, match=r"--speculative-config: 'ngram' is not JSON"):
        parse_value(SpeculativeOptions, "--speculative-config", "ngram")
