"""Masks are about bytes: every kind of tokenizer that can write all of them gives valid text."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest
import tiny_tokenizers
from random_schemas import random_schema

from serve.errors import ConfigError
from serve.request import SamplingParams
from serve.text.grammar.grammar import Cost, Matcher
from serve.text.grammar.source import to_llguidance
from serve.text.grammar.vocabulary import Vocabulary, load_vocabulary
from serve.text.tokenizer import Tokenizer, TokenizerBundle

pytest.importorskip("llguidance")
ALL_BYTES = ["qwen", "llama3", "llama2", "llama2-legacy", "mistral", "gemma"]
NUM_PADDING = 3


def load(path, kind: str) -> tuple[Tokenizer, Vocabulary]:
    folder = tiny_tokenizers.tokenizer_folder(path, kind)
    tokenizer = Tokenizer(TokenizerBundle.from_folder(folder))
    return tokenizer, load_vocabulary(folder, tokenizer.vocab_size + NUM_PADDING, [tokenizer.eos_token_id or 0])


def walk(vocabulary: Vocabulary, kind: str, source: str, seed: int) -> list[int]:
    """Legal tokens at random, to the end."""
    choose, ids = random.Random(seed), list[int]()
    core = vocabulary.matcher(to_llguidance(kind, source, is_compact=False, special=vocabulary.special))
    matcher = Matcher(core, vocabulary, SamplingParams(max_tokens=1000), Cost())
    while not matcher.is_complete:
        mask = matcher.mask()
        assert mask is not None, matcher.failure
        token_id = choose.choice([i for i in range(vocabulary.size) if mask[i >> 3] >> (i & 7) & 1])
        if matcher.is_end(token_id):
            break
        ids.append(token_id)
        matcher.accept(token_id)
    return ids


@pytest.mark.parametrize("kind", ALL_BYTES)
def test_legal_tokens_spell_valid_text(kind, tmp_path):
    tokenizer, vocabulary = load(tmp_path, kind)

    def text_of(ids: list[int]) -> str:
        detokenizer = tokenizer.detokenizer()
        return detokenizer.push(ids) + detokenizer.finish()

    for seed in range(40):
        schema = random_schema(seed)
        found = json.loads(text_of(walk(vocabulary, "json_schema", json.dumps(schema), seed)))
        jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)
    for seed in range(10):
        pattern = "[a-z]{2,6} 日本é[0-9]+!"
        assert re.fullmatch(pattern, text_of(walk(vocabulary, "regex", pattern, seed)))


@pytest.mark.parametrize("kind", ALL_BYTES)
def test_special_tokens_and_padding_are_never_legal_text(kind, tmp_path):
    tokenizer, vocabulary = load(tmp_path, kind)
    core = vocabulary.matcher(to_llguidance("regex", r"(.|\n)+", is_compact=False, special=vocabulary.special))
    mask = Matcher(core, vocabulary, SamplingParams(max_tokens=9), Cost()).mask()
    assert mask is not None
    legal = {i for i in range(vocabulary.size) if mask[i >> 3] >> (i & 7) & 1}
    assert legal and not legal & set(tokenizer.special_tokens.values())
    assert not legal & set(range(tokenizer.vocab_size, vocabulary.size))


@pytest.mark.parametrize("kind", sorted(set(tiny_tokenizers.KINDS) - set(ALL_BYTES)))
def test_a_tokenizer_that_cannot_write_every_text_is_refused(kind, tmp_path):
    with pytest.raises(ConfigError, match="byte-level"):
        load(tmp_path, kind)


@pytest.mark.parametrize("kind", ALL_BYTES)
def test_a_forced_text_comes_in_the_tokens_the_model_would_use(kind, tmp_path):
    """One choice: the mask lets through one token at a time, and they are the tokenizer's own."""
    tokenizer, vocabulary = load(tmp_path, kind)
    ids = walk(vocabulary, "choice", json.dumps(["the and the over"]), 0)
    expected = tokenizer.encode("the and the over", add_special_tokens=False)
    spelled = b"".join(map(tokenizer.token_bytes, expected))
    assert ids == expected or spelled != b"the and the over"  # SentencePiece puts a space in front of a text
