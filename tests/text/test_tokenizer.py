"""Ids and text equal transformers' `AutoTokenizer`; users' text holds no control tokens; the bundle is the files."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, LLAMA3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, TEXT, tokenizer_folder
from transformers import AutoTokenizer

from serve.errors import ConfigError
from serve.text.tokenizer import LONG_AT_ONCE, LONG_CHARS, Tokenizer, TokenizerBundle

CONTROLS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[CLS]", "[UNK]", "<unk>", "<eos>", "<|eot_id|>", "<|end|>")


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tokenizer_folder(tmp_path_factory.mktemp("model"), request.param)
    return Tokenizer(TokenizerBundle.from_folder(folder)), AutoTokenizer.from_pretrained(folder)


def load(folder: Path) -> Tokenizer:
    return Tokenizer(TokenizerBundle.from_folder(folder))


@pytest.mark.parametrize("text", [*TEXT[:4], "", " ", "  two  spaces ", "\n\n\n", "▁", "a\u0301 ﬁ Ａ", "x" * 300])
def test_ids_and_text_equal_transformers(pair, text):
    ours, theirs = pair
    for add_special_tokens in (True, False):
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80))
def test_any_text_is_encoded_as_transformers_does(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


def test_the_named_tokens_equal_transformers(pair):
    ours, theirs = pair
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("control", CONTROLS)
def test_control_tokens_in_a_prompt_stay_text(pair, control):
    ours, theirs = pair
    special = set(theirs.all_special_ids) - {theirs.unk_token_id}
    for text in (control, f"a{control}b", f" {control} ", control * 3):
        ids = ours.encode(text, add_special_tokens=False)
        assert not special.intersection(ids)
        if theirs.unk_token_id not in ids:
            assert ours.decode(ids, skip_special_tokens=False).strip() == text.strip()


def test_full_width_look_alikes_stay_text(tmp_path):
    """A normaliser that folds "＜s＞" into "<s>" must not make a token of it."""
    folder = tokenizer_folder(tmp_path, "llama2")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "NFKC"}
    for token in spec["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert not {1, 2}.intersection(load(folder).encode("a＜s＞b＜/s＞<s>", add_special_tokens=False))


def test_added_tokens_that_control_nothing_are_still_tokens(tmp_path):
    tokenizer = load(tokenizer_folder(tmp_path, "qwen"))
    assert tokenizer.token_text(tokenizer.encode("a<|fim_prefix|>")[-1]) == "<|fim_prefix|>"


def test_tokens_named_beside_the_tokenizer_are_read(tmp_path):
    folder = tokenizer_folder(tmp_path, "qwen")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": config["tokenizer_class"]}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    size = load(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": size}))
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.encode("a<new>b") == theirs.encode("a<new>b") == [*ours.encode("a"), size, *ours.encode("b")]


def test_the_bundle_alone_makes_the_tokenizer(tmp_path):
    folder = tokenizer_folder(tmp_path, "llama3", chat_template=LLAMA3)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "model.safetensors").write_bytes(b"weights")
    bundle = TokenizerBundle.from_folder(folder)
    assert set(bundle.files) == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
    }  # fmt: skip
    tokenizer = Tokenizer(TokenizerBundle(dict(bundle.files)))
    assert tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.generation_config == {"temperature": 0.6}


def test_templates_are_found_where_transformers_keeps_them(tmp_path):
    folder = tokenizer_folder(tmp_path, "qwen")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    message = [{"role": "user", "content": "Hi"}]

    def with_config(template: Any) -> str:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        tools = [{"type": "function", "function": {"name": "f"}}]
        ids = [*load(folder).encode_chat(message), *load(folder).encode_chat(message, tools=tools)]
        return load(folder).decode(ids)

    assert with_config("one") == "oneone"
    named = [{"name": "default", "template": "plain "}, {"name": "tool_use", "template": "tools"}]
    assert with_config(named) == "plain tools"
    (folder / "chat_template.jinja").write_text("file")
    assert with_config("one") == "filefile"
    (tmp_path / "mine.jinja").write_text("mine")
    bundle = TokenizerBundle.from_folder(folder, chat_template=tmp_path / "mine.jinja")
    assert Tokenizer(bundle).encode_chat(message) == load(folder).encode("mine")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer.json; write one"):
        TokenizerBundle.from_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere.jinja' is not a file"):
        TokenizerBundle.from_folder(tokenizer_folder(tmp_path, "qwen"), chat_template=tmp_path / "nowhere.jinja")


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"model": 3}', b'{"model": {"type": "BPE", "vocab": {}}}'])
def test_a_broken_tokenizer_is_refused(data):
    with pytest.raises(ConfigError, match=r"tokenizer.json"):
        Tokenizer(TokenizerBundle({"tokenizer.json": data}))


def test_threads_share_a_tokenizer(tmp_path):
    tokenizer = load(tokenizer_folder(tmp_path, "qwen", chat_template=CHATML))
    messages = [[{"role": "user", "content": f"{text} <|im_end|> {index}"}] for index, text in enumerate(TEXT * 4)]
    expected = [tokenizer.encode_chat(chat) for chat in messages]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tokenizer.encode_chat, messages * 4)) == expected * 4


def test_long_texts_are_encoded_a_few_at_a_time(tmp_path, monkeypatch):
    """What a text costs while it is encoded is many times its size, so a burst of long ones must not add up."""
    tokenizer = load(tokenizer_folder(tmp_path, "qwen"))
    real, lock, full = tokenizer._tokenizer, threading.Lock(), threading.Event()
    running, most = 0, 0

    class Counted:
        def encode(self, text: str, **options: Any) -> Any:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
                if running == LONG_AT_ONCE:
                    full.set()
            assert full.wait(30)
            encoded = real.encode(text[:10], **options)
            with lock:
                running -= 1
            return encoded

    monkeypatch.setattr(tokenizer, "_tokenizer", Counted())
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(tokenizer.encode, ["a" * (LONG_CHARS + 1)] * 8))
    assert most == LONG_AT_ONCE
