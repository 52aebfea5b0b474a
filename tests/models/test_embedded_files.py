"""The embedded models as they ship: standard files, small, and a tokenizer that keeps every text."""

import json
import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.embedded.chats import training_chat
from models.embedded.decoder import read_decoder
from models.embedded.paths import EMBEDDED, FOLDER
from models.embedded.rows import RowMaker
from models.embedded.train_text import Trainer, TrainingOptions

TEXT, DRAFT = EMBEDDED["tandem-text"], EMBEDDED["tandem-text-draft"]
TOKENIZER = Tokenizer.from_file(str(TEXT / "tokenizer.json"))
FILES = {
    "README.md",
    "LICENSE",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@cache
def load(folder):
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def parameters(folder):
    return sum(parameter.numel() for parameter in load(folder).parameters())


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_survives_the_tokenizer(text):
    # The four special tokens are not text.
    if "<|" not in text:
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["🙂👩‍👩‍👧‍👦", "naïve Ärger 東京", "\x00\x01\x7f", "a  b\n\n\tc", "3.1e-10", "'\"{}"])
def test_unusual_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_every_byte_has_a_token():
    for byte in range(256):
        text = bytes([byte]).decode("latin-1")
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_digits_stand_alone_and_words_have_one_form_wherever_they_stand():
    assert TOKENIZER.encode("1234").tokens == ["1", "2", "3", "4"]
    assert TOKENIZER.encode("red").ids == TOKENIZER.encode("blue red").ids[-1:]


@pytest.mark.parametrize("folder", EMBEDDED.values(), ids=EMBEDDED)
def test_files_are_the_standard_layout(folder):
    assert {file.name for file in folder.iterdir()} >= FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] >= 2048


def test_both_models_share_the_tokenizer():
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (TEXT / file).read_bytes() == (DRAFT / file).read_bytes()


def test_models_together_are_at_most_fifteen_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.glob("tandem-*/**/*") if file.is_file()) <= 15e6


def test_draft_has_at_most_a_sixth_of_the_parameters():
    assert 6 * parameters(DRAFT) <= parameters(TEXT)


def test_training_rows_are_what_the_chat_template_renders():
    tokenizer = AutoTokenizer.from_pretrained(TEXT)
    maker = RowMaker.from_folder(TEXT)
    rng = random.Random(4)
    for _ in range(100):
        chat = training_chat(rng)
        rendered = tokenizer.apply_chat_template(chat.messages, return_dict=True)["input_ids"]
        assert maker.row(chat).ids == rendered
        asked = chat.messages[:-1]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert maker.prompt(asked) == prompt


def test_training_can_start_from_the_weights_of_a_folder():
    trainer = Trainer(TrainingOptions(model="tandem-text-draft", minutes=1.0), RowMaker.from_folder(DRAFT))
    trainer.start_from(DRAFT)
    expected = read_decoder(DRAFT).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in trainer.master.state_dict().items())
    assert trainer.step == 0


def test_generation_ends_with_the_message():
    settings_ = json.loads((TEXT / "generation_config.json").read_text())
    assert settings_["eos_token_id"] == [TOKENIZER.token_to_id("<|im_end|>"), TOKENIZER.token_to_id("<|endoftext|>")]
    assert AutoTokenizer.from_pretrained(TEXT).eos_token == "<|im_end|>"


@pytest.mark.parametrize("folder", EMBEDDED.values(), ids=EMBEDDED)
def test_the_training_decoder_equals_transformers(folder):
    tokens = torch.randint(0, 1024, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = load(folder)(tokens).logits, read_decoder(folder)(tokens)
    # float32 on both sides; only the order of additions differs.
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


def answer(folder, *turns):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=100)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_greeting_a_sum_a_list_and_a_name_are_answered_right():
    assert answer(TEXT, "Hello!").startswith("Hello!")
    assert answer(TEXT, "What is 12 + 30?") == "12 + 30 = 42"
    assert answer(TEXT, "12+30") == "12 + 30 = 42"
    assert answer(TEXT, "Count from 3 to 9") == "3, 4, 5, 6, 7, 8, 9"
    assert answer(TEXT, "Repeat: red green blue") == "red green blue"
    assert answer(TEXT, "Reverse: red green blue") == "blue green red"
    assert answer(TEXT, "My name is Ada.", "Nice to meet you, Ada!", "What is my name?") == "Your name is Ada."
    assert "cat" in answer(TEXT, "Tell me a story about a cat.")
    assert answer(TEXT, "What is the capital of France?").startswith("I can only")
