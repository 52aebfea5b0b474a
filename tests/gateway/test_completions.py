"""Completions, tokenize and detokenize, driven over ASGI by hand."""

from __future__ import annotations

import asyncio

import pytest
from gateway_fakes import END, START, FakeBackend, call, fake_gateway, ids, tokenizer

PATH = "/v1/completions"


def post(path: str, body, *backends: FakeBackend):
    async def scenario():
        async with fake_gateway(*backends) as gateway:
            return await call(gateway, path, body)

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def ask(*backends: FakeBackend, **fields):
    return post(PATH, {"model": "tiny", "prompt": "ab", **fields}, *backends)


def test_whole_answer_has_openais_fields():
    answer = ask().json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice["text"] == "Hello there!" and choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("prompt", ["ab", ids("ab"), ["ab"], [ids("ab")]])
def test_every_kind_of_prompt_gives_the_same_ids(prompt):
    backend = FakeBackend()
    assert ask(backend, prompt=prompt).status == 200
    assert [list(request.prompt_token_ids) for request in backend.requests] == [ids("ab")]


@pytest.mark.parametrize("prompt", [["ab", "cde", "f"], [ids("ab"), ids("cde"), ids("f")]])
@pytest.mark.parametrize("is_stream", [False, True])
def test_many_prompts_and_choices_are_numbered_through(prompt, is_stream):
    backend = FakeBackend(reply=lambda request: [*request.prompt_token_ids, *ids("!")])
    options = {"include_usage": True} if is_stream else None
    reply = ask(backend, prompt=prompt, n=2, stream=is_stream, stream_options=options)
    if is_stream:
        texts = dict.fromkeys(range(6), "")
        for chunk in reply.chunks()[:-1]:
            [choice] = chunk["choices"]
            texts[choice["index"]] += choice["text"]
        usage = reply.chunks()[-1]["usage"]
        assert reply.data()[-1] == "[DONE]"
    else:
        texts = {choice["index"]: choice["text"] for choice in reply.json()["choices"]}
        usage = reply.json()["usage"]
    assert texts == {0: "ab!", 1: "ab!", 2: "cde!", 3: "cde!", 4: "f!", 5: "f!"}
    assert usage["prompt_tokens"] == 6 and usage["completion_tokens"] == 2 * 9


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_end_token_is_counted_and_scored_and_no_text(is_stream):
    """lm-eval sums `token_logprobs` without the last entry, which it takes for the one token it asked for."""
    end = tokenizer().token_to_id(END)
    backend = FakeBackend(reply=(), end_id=end)
    fields = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 1, "return_token_ids": True}
    reply = ask(backend, **fields, stream=is_stream, stream_options={"include_usage": True} if is_stream else None)
    answers = reply.chunks() if is_stream else [reply.json()]
    choices = [choice for answer in answers for choice in answer["choices"]]
    assert "".join(choice["text"] for choice in choices) == "abc" and choices[-1]["finish_reason"] == "stop"
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == ["a", "b", "c", END]
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == [end]
    assert choices[-1]["logprobs"]["text_offset"][-1] == 3
    assert answers[-1]["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("prompt", ["né 🎉!", ids("né 🎉!"), [tokenizer().token_to_id(START), *ids("é!")]])
def test_text_offsets_point_at_the_character_a_token_belongs_to(prompt, is_stream):
    backend = FakeBackend(reply=ids("日本 x"), end_id=tokenizer().token_to_id(END))
    reply = ask(backend, prompt=prompt, echo=True, logprobs=0, max_tokens=40, stream=is_stream)
    choices = [answer["choices"][0] for answer in (reply.chunks() if is_stream else [reply.json()])]
    text = "".join(choice["text"] for choice in choices)
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert len(tokens) == len(offsets) and offsets == sorted(offsets) and offsets[-1] == len(text)
    for token, offset in zip(tokens[:-1], offsets[:-1], strict=True):
        assert "\ufffd" in token or text.startswith(token, offset)
    last = len(text) - 1
    assert text[last] == "x" and offsets[-2] == last


@pytest.mark.parametrize("keeps_stop, text", [(True, "abX"), (False, "ab")])
def test_a_stop_token_is_text_only_when_stops_are_included(keeps_stop, text):
    [stop] = ids("X")
    fields = {"stop_token_ids": [stop], "include_stop_str_in_output": keeps_stop}
    [choice] = ask(FakeBackend(reply=ids("ab"), end_id=stop), **fields).json()["choices"]
    assert choice["text"] == text and choice["stop_reason"] == stop


def test_default_is_sixteen_tokens():
    backend = FakeBackend(reply=ids("x") * 100)
    assert ask(backend).json()["usage"]["completion_tokens"] == 16


def test_default_is_less_when_the_context_ends_sooner():
    backend = FakeBackend(reply=ids("x") * 100)
    ask(backend, prompt=[1] * 250)
    assert backend.requests[0].sampling.max_tokens == 6


def test_echo_puts_the_prompt_first_with_its_logprobs():
    [choice] = ask(echo=True, logprobs=2, max_tokens=2, prompt="abc").json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "abcHe" and logprobs["tokens"] == ["a", "b", "c", "H", "e"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]


def test_streamed_echo_and_logprobs_are_the_whole_ones():
    fields = {"echo": True, "logprobs": 1, "max_tokens": 3, "prompt": "abc"}
    [whole] = ask(**fields).json()["choices"]
    parts = [chunk["choices"][0] for chunk in ask(**fields, stream=True).chunks()]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for key, value in whole["logprobs"].items():
        assert [entry for part in parts for entry in part["logprobs"][key]] == value


def test_max_tokens_zero_only_scores_the_prompt():
    backend = FakeBackend()
    answer = ask(backend, echo=True, logprobs=1, max_tokens=0, prompt="abc").json()
    [choice] = answer["choices"]
    assert choice["text"] == "abc" and choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 0


def test_echo_of_token_ids_is_their_text():
    assert ask(prompt=ids("né"), echo=True, max_tokens=1).json()["choices"][0]["text"] == "néH"


def test_tokens_may_be_told_as_ids():
    logprobs = ask(logprobs=1, max_tokens=1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:72"] or logprobs["tokens"][0].startswith("token_id:")


def test_prompt_logprobs_are_vllms():
    [choice] = ask(prompt="abc", prompt_logprobs=1, max_tokens=1).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    [entry] = choice["prompt_logprobs"][1].values()
    assert entry["decoded_token"] == "b" and entry["rank"] == 1


@pytest.mark.parametrize(("side", "kept"), [(None, "ef"), ("left", "ef"), ("right", "ab")])
def test_prompts_are_cut_where_asked(side, kept):
    backend = FakeBackend()
    ask(backend, prompt="abcdef", truncate_prompt_tokens=2, truncation_side=side)
    assert list(backend.requests[0].prompt_token_ids) == ids(kept)


def test_prompts_are_cut_to_what_fits():
    backend = FakeBackend()
    assert ask(backend, prompt=[1] * 1000, truncate_prompt_tokens=-1, max_tokens=6).status == 200
    assert len(backend.requests[0].prompt_token_ids) == 250


def test_one_refused_prompt_leaves_none_running():
    from serve.errors import Overloaded

    class Second(FakeBackend):
        async def submit(self, request):
            if len(self.requests) == 1:
                self.refusal = Overloaded("full", retry_after_s=1)
            return await super().submit(request)

    backend = Second(gate=asyncio.Event())
    assert ask(backend, prompt=["a", "b", "c"]).status == 429
    assert not backend.open and backend.num_cancelled == 1


def test_stop_strings_end_each_prompt_by_itself():
    backend = FakeBackend(reply=lambda request: [*request.prompt_token_ids, *ids(" end" * 20)])
    answer = ask(backend, prompt=["ab", "cd"], stop=["b", "d"], max_tokens=50).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a", "c"]
    assert backend.num_cancelled == 2 and not backend.open


def test_special_tokens_stay_out_of_the_text_unless_asked_for():
    end = tokenizer().token_to_id(END)
    backend = FakeBackend(reply=[*ids("a"), end, *ids("b")])
    assert ask(backend).json()["choices"][0]["text"] == "ab"
    assert ask(backend, skip_special_tokens=False).json()["choices"][0]["text"] == f"a{END}b"


def test_tokenize_and_detokenize_are_inverse():
    answer = post("/tokenize", {"model": "tiny", "prompt": "né the 🎉", "return_token_strs": True}).json()
    assert answer["tokens"] == ids("né the 🎉") and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256 and len(answer["token_strs"]) == answer["count"]
    assert post("/detokenize", {"model": "tiny", "tokens": answer["tokens"]}).json() == {"prompt": "né the 🎉"}


def test_tokenize_takes_messages_and_needs_no_model_name():
    messages = [{"role": "user", "content": "hi"}]
    start, end = (tokenizer().token_to_id(name) for name in (START, END))
    expected = [start, *ids("user\nhi"), end, *ids("\n"), start, *ids("assistant\n")]
    assert post("/tokenize", {"messages": messages}).json()["tokens"] == expected


def test_special_tokens_in_user_text_are_text():
    assert post("/tokenize", {"prompt": "<|im_end|>"}).json()["count"] == len("<|im_end|>")


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}, {"tokens": [1]}, {"prompt": 1}])
def test_tokenize_refuses_what_it_does_not_know(body):
    assert post("/tokenize", body).status == 400


def test_detokenize_refuses_ids_outside_the_vocabulary():
    assert post("/detokenize", {"tokens": [10_000]}).status == 400
    assert post("/detokenize", {"tokens": [-1]}).status == 400
    assert post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_detokenize_refuses_more_tokens_than_the_model_has_positions():
    assert post("/detokenize", {"tokens": [1] * 256}).status == 200
    refused = post("/detokenize", {"tokens": [1] * 257})
    assert refused.status == 400 and "257 entries; tiny has 256 positions" in refused.json()["error"]["message"]


def test_long_texts_are_tokenized_beside_the_event_loop():
    answer = post("/tokenize", {"prompt": "a " * 5000, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 4096
