"""Beams from the real engine, over HTTP, with the real client: alone, streamed, under a grammar."""

from __future__ import annotations

import itertools
from pathlib import Path

import openai
import pytest
import torch
from serving import Serving, serving
from tiny import tiny_folder, tiny_model

PROMPT = [5, 99, 31, 7, 200, 14]
CHOICES = ["yes", "no", "no way", "maybe"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder: Path = tiny_folder(tmp_path_factory.mktemp("models"), "qwen3")
    with serving(
        str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny", "--max-num-seqs", "32"
    ) as running:
        yield running


def ask(server: Serving, **fields):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    known = {name: fields.pop(name) for name in ("n", "stream", "logprobs", "max_tokens") if name in fields}
    known = {"max_tokens": 8, **known}
    return client.completions.create(
        model="tiny", prompt=PROMPT, extra_body={"return_token_ids": True, **fields}, **known
    )


@pytest.fixture(scope="module")
def expected():
    ids = torch.tensor([PROMPT])
    answer = tiny_model("qwen3").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=4, num_return_sequences=4,
        do_sample=False, pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    return answer.sequences[:, len(PROMPT) :].tolist(), answer.sequences_scores.tolist()


def test_the_best_beams_come_first_with_their_scores(server, expected):
    answer = ask(server, num_beams=4, n=3)
    tokens, scores = expected
    assert [choice.token_ids for choice in answer.choices] == tokens[:3]
    assert [choice.beam_score for choice in answer.choices] == pytest.approx(scores[:3], abs=1e-4)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)


def test_vllms_beam_search_returns_all_its_beams(server, expected):
    answer = ask(server, use_beam_search=True, n=4, temperature=0)
    assert [choice.token_ids for choice in answer.choices] == expected[0]


@pytest.mark.parametrize("n", [1, 4])
def test_streamed_beams_are_the_same(server, expected, n):
    tokens: dict[int, list[int]] = {index: [] for index in range(n)}
    scores: dict[int, float] = {}
    for chunk in ask(server, num_beams=4, n=n, stream=True):
        for choice in chunk.choices:
            tokens[choice.index] += choice.token_ids
            if choice.finish_reason is not None:
                scores[choice.index] = choice.beam_score
    assert list(tokens.values()) == expected[0][:n]
    assert list(scores.values()) == pytest.approx(expected[1][:n], abs=1e-4)


def test_log_probabilities_add_up_to_the_score(server):
    (choice,) = ask(server, num_beams=3, logprobs=0).choices
    assert sum(choice.logprobs.token_logprobs) / 8 == pytest.approx(choice.beam_score, abs=1e-5)


def test_beams_under_a_grammar_are_the_likeliest_of_what_it_allows(server):
    pytest.importorskip("llguidance", reason="grammars are not checked without it")
    constrained = {"structured_outputs": {"choice": CHOICES}, "num_beams": 4, "length_penalty": 0, "max_tokens": 20}
    answer = ask(server, n=4, **constrained)
    texts = [choice.text for choice in answer.choices]
    assert sorted(set(texts)) == sorted(texts) and set(texts) <= set(CHOICES)
    assert all(choice.finish_reason == "stop" for choice in answer.choices)
    scores = [choice.beam_score for choice in answer.choices]
    assert all(earlier >= later for earlier, later in itertools.pairwise(scores))


def test_fewer_outputs_than_asked_for_is_an_error_that_says_so(server):
    pytest.importorskip("llguidance", reason="grammars are not checked without it")
    with pytest.raises(openai.APIStatusError, match="n is 3, but the request lets beams find only 2 outputs"):
        ask(server, n=3, num_beams=3, structured_outputs={"choice": ["a", "b"]}, early_stopping=True)


def test_a_search_that_can_never_fit_is_refused(server):
    with pytest.raises(openai.BadRequestError, match="num_beams is 64, more than the"):
        ask(server, num_beams=64)
