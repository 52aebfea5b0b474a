"""Streamed text equals the decoded whole, for every kind of tokenizer, and never ends in half a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BYTES, KINDS, TEXT, tokenizer_folder

from serve.text.tokenizer import Tokenizer, TokenizerBundle

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("model"), request.param)


def load(path: Path, kind: str) -> Tokenizer:
    return Tokenizer(TokenizerBundle.from_folder(tokenizer_folder(path, kind)))


def byte_ids(tokenizer: Tokenizer) -> set[int]:
    """The tokens that stand for one byte by name (`<0x0A>`)."""
    vocab = tokenizer._tokenizer.get_vocab()
    return {vocab[name] for name in BYTES if name in vocab}


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.finish()]


@QUICK
@given(text=st.text(max_size=60), skip=st.booleans())
def test_streamed_text_equals_the_decoded_whole(tokenizer, text, skip):
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == whole
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    assert detokenizer.push(ids) + detokenizer.finish() == whole


@QUICK
@given(data=st.data(), skip=st.booleans())
def test_any_ids_stream_as_they_decode(tokenizer, data, skip):
    """Runs of byte tokens that are no characters are the one exception, and tested below."""
    single = byte_ids(tokenizer)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3).filter(lambda i: i not in single), max_size=30))
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@QUICK
@given(text=st.text(min_size=1, max_size=20), cut=st.integers(1, 3))
def test_no_piece_holds_half_a_character(tokenizer, text, cut):
    """What is out is final: a prefix of the whole, without U+FFFD while the character may still be completed."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    sent = ""
    detokenizer = tokenizer.detokenizer()
    for start in range(0, len(ids), cut):
        sent += detokenizer.push(ids[start : start + cut])
        assert whole.startswith(sent)


@QUICK
@given(st.lists(st.integers(0, 255), max_size=12).map(bytes))
def test_bytes_that_are_no_characters_become_replacement_characters(data):
    tokenizer = BYTE_FALLBACK
    ids = [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    streamed = "".join(stream(tokenizer, ids))
    try:
        expected = data.decode()
    except UnicodeDecodeError:
        assert "\ufffd" in streamed
        good = data.decode(errors="ignore")
        assert streamed.replace("\ufffd", "") == good.replace("\ufffd", "").removeprefix(" " * data.startswith(b" "))
    else:
        assert streamed == expected.removeprefix(" ")  # the first space belongs to the pieces of these tokenizers


@pytest.mark.parametrize("kind", ["qwen", "llama3", "llama2"])
def test_tokens_that_are_shown_have_the_text_given_and_the_others_theirs(tmp_path, kind):
    tokenizer = load(tmp_path, kind)
    name = "<|im_end|>" if kind == "qwen" else "<|eot_id|>" if kind == "llama3" else "</s>"
    [(token_id, text)] = tokenizer.special_ids([name, "the", "<|no such token|>"]).items()
    assert text == name
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("the fox", "🦜"))
    ids = [*before, token_id, *after]
    for skip in (True, False):
        detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, shown={token_id: "[END]"})
        pieces = [*(detokenizer.push([one]) for one in ids), detokenizer.finish()]
        assert "[END]" in pieces
        assert "".join(pieces).replace(" ", "") == "thefox[END]🦜", "skip or not"
    assert name not in "".join(stream(tokenizer, ids))


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
def test_a_character_comes_out_whole_with_its_last_byte(tmp_path, kind):
    tokenizer = load(tmp_path, kind)
    ids = tokenizer.encode("🦜", add_special_tokens=False)
    pieces = [piece for piece in stream(tokenizer, ids) if piece]
    assert len(ids) >= 3
    assert pieces == ["🦜"]


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
def test_an_unfinished_character_becomes_visible_only_at_the_end(tmp_path, kind):
    tokenizer = load(tmp_path, kind)
    ids = tokenizer.encode("a🦜", add_special_tokens=False)[:-1]
    *pieces, last = stream(tokenizer, ids)
    assert "".join(pieces) == "a"
    assert last == tokenizer.decode(ids)[1:]


def test_spaces_between_words_are_kept_and_the_one_in_front_is_not(tmp_path):
    tokenizer = load(tmp_path, "llama2")
    assert stream(tokenizer, tokenizer.encode("the fox", add_special_tokens=False))[0][0] == "t"
    assert "".join(stream(tokenizer, tokenizer.encode("the  fox", add_special_tokens=False))) == "the  fox"


def test_a_word_of_pieces_is_written_together(tmp_path):
    tokenizer = load(tmp_path, "wordpiece")
    ids = tokenizer.encode("the quickest", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "the quickest"


def test_token_bytes_joined_are_the_text(tmp_path):
    for kind in ("qwen", "llama3", "gemma"):
        tokenizer = load(tmp_path, kind)
        for text in TEXT[:4]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids) == text


def test_token_text_keeps_the_space_in_front_of_a_word(tmp_path):
    for kind in ("qwen", "llama2", "gemma"):
        tokenizer = load(tmp_path, kind)
        texts = [tokenizer.token_text(token) for token in tokenizer.encode("x the", add_special_tokens=False)]
        assert "".join(texts[-2:]).endswith(" the") or texts[-1] == " the"


def test_ids_outside_the_vocabulary_have_no_text(tokenizer):
    beyond = tokenizer.vocab_size + 100
    assert tokenizer.token_bytes(beyond) == b""
    assert tokenizer.token_text(beyond) == ""


BYTE_FALLBACK: Tokenizer


@pytest.fixture(scope="module", autouse=True)
def _byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> None:
    global BYTE_FALLBACK
    BYTE_FALLBACK = load(tmp_path_factory.mktemp("model"), "llama2")
