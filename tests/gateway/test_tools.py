"""Tools in chat: what reaches the model, what comes back, whole and streamed, what is refused. Reasoning likewise."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest
from gateway_fakes import CHAT_TEMPLATE, TOOL_TEMPLATE, FakeBackend, call, card, fake_gateway, ids, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from models.embedded.paths import EMBEDDED
from serve.gateway.parsing.formats import call_format
from serve.gateway.server import GatewayServer
from serve.options import GatewayOptions
from serve.text.tokenizer import Tokenizer, TokenizerBundle

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TWO_CALLS = f'One moment.\n{CALL}\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>'
THINK_TEMPLATE = TOOL_TEMPLATE + "{# <think> and </think> #}"
OPEN_TEMPLATE = TOOL_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}") + "{# </think> #}"
MISTRAL_TEMPLATE = "{{ tools }}{{ '[TOOL_CALLS]'[:0] }}" + CHAT_TEMPLATE
LLAMA_TEMPLATE = """{{ tools }}{# <|start_header_id|> {"name": …, "parameters": …} #}""" + CHAT_TEMPLATE


def body(**fields):
    return {"model": "tiny", "messages": [USER], "tools": [WEATHER, NOW], **fields}


def says(text: str, template: str = TOOL_TEMPLATE, **fields) -> FakeBackend:
    big = card(max_model_len=4096, **fields.pop("card", {}))
    return FakeBackend(reply=ids(text), chat_template=template, card=big, **fields)


def ask(backend: FakeBackend, **fields):
    async def scenario():
        async with fake_gateway(backend) as gateway:
            return await call(gateway, PATH, body(**fields))

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def refusal(backend: FakeBackend | None = None, **fields) -> dict:
    reply = ask(backend or says("x"), **fields)
    assert reply.status == 400, reply.body
    return reply.json()["error"]


def added_up(chunks: list[dict], index: int = 0) -> dict:
    """A message from its deltas, as clients add them up."""
    message: dict = {"content": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                if delta.get(name) is not None:
                    message[name] = (message.get(name) or "") + delta[name]
            for part in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if part["index"] == len(calls):
                    assert part["id"] and part["type"] == "function" and part["function"]["arguments"] == ""
                    calls.append({"name": part["function"]["name"], "arguments": ""})
                else:
                    assert part.keys() == {"index", "function"} and part["function"].keys() == {"arguments"}
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return message


def test_the_model_sees_the_tools_as_they_were_sent():
    backend = says("Hello")
    ask(backend, tools=[{**WEATHER, "function": {**WEATHER["function"], "strict": False}}])
    prompt = tokenizer().decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert json.dumps(WEATHER) in prompt, "same order of keys, without strict"


def test_calls_come_as_openai_sends_them():
    answer = ask(says(TWO_CALLS)).json()
    [choice] = answer["choices"]
    first, second = choice["message"]["tool_calls"]
    assert first["type"] == "function" and first["function"] == {
        "name": "get_weather",
        "arguments": '{"city": "Zürich"}',
    }
    assert second["function"] == {"name": "now", "arguments": "{}"} and first["id"] != second["id"]
    assert choice["message"]["content"] == "One moment." and choice["finish_reason"] == "tool_calls"
    assert ask(says(CALL)).json()["choices"][0]["message"]["content"] is None


def test_an_answer_without_calls_is_an_ordinary_one():
    [choice] = ask(says("Hello there!")).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there!", "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("tokens_per_step", [1, 3, 1000])
def test_streamed_calls_add_up_to_the_whole_ones(tokens_per_step):
    reply = ask(says(TWO_CALLS, tokens_per_step=tokens_per_step), stream=True, stream_options={"include_usage": True})
    *chunks, last = reply.chunks()
    assert added_up(chunks) == {
        "content": "One moment.",
        "tool_calls": [{"name": "get_weather", "arguments": '{"city": "Zürich"}'}, {"name": "now", "arguments": "{}"}],
    }
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" and chunks[-1]["choices"][0]["delta"] == {}
    assert last["usage"]["completion_tokens"] == len(ids(TWO_CALLS)) and reply.data()[-1] == "[DONE]"


def test_arguments_stream_while_they_are_generated():
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "' + "x" * 50
    chunks = ask(says(text), stream=True, max_tokens=len(ids(text))).chunks()
    parts = [c for c in chunks if c["choices"][0]["delta"].get("tool_calls")]
    assert len(parts) > 20
    assert chunks[-1]["choices"][0]["finish_reason"] == "length", "and a call that is cut off says so"


def test_each_of_several_choices_has_calls_of_its_own():
    reply = ask(says(TWO_CALLS), n=2, stream=True)
    assert added_up(reply.chunks(), 0) == added_up(reply.chunks(), 1)
    whole = ask(says(TWO_CALLS), n=2).json()
    call_ids = [made["id"] for choice in whole["choices"] for made in choice["message"]["tool_calls"]]
    assert len(set(call_ids)) == 4


def test_logprobs_and_token_ids_cover_every_token_of_a_call():
    whole = ask(says(CALL), logprobs=True, return_token_ids=True).json()["choices"][0]
    assert len(whole["logprobs"]["content"]) == len(whole["token_ids"]) == len(ids(CALL))
    chunks = ask(says(CALL), logprobs=True, stream=True).chunks()
    entries = [entry for c in chunks for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert entries == whole["logprobs"]["content"]


def test_stop_strings_end_answers_with_calls_too():
    [choice] = ask(says(TWO_CALLS), stop=["</tool_call>"]).json()["choices"]
    assert [made["function"]["name"] for made in choice["message"]["tool_calls"]] == ["get_weather"]
    assert choice["finish_reason"] == "tool_calls" and choice["stop_reason"] == "</tool_call>"
    [choice] = ask(says(TWO_CALLS), stop=["moment"]).json()["choices"]
    assert choice["message"]["content"] == "One " and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("is_stream", [False, True])
def test_without_parallel_calls_the_answer_ends_with_the_first(is_stream):
    backend = says(TWO_CALLS + " and so on" * 9)
    reply = ask(backend, parallel_tool_calls=False, n=2, stream=is_stream)
    if is_stream:
        calls = added_up(reply.chunks())["tool_calls"]
    else:
        calls = [made["function"] for made in reply.json()["choices"][1]["message"]["tool_calls"]]
    assert [made["name"] for made in calls] == ["get_weather"]
    assert backend.num_cancelled == 2, "what would follow is not generated"


def test_tools_that_may_not_be_called_are_not_shown_and_text_is_not_read_as_a_call():
    backend = says(CALL)
    message = ask(backend, tool_choice="none").json()["choices"][0]["message"]
    assert message["content"] == CALL and "tool_calls" not in message
    prompt = tokenizer().decode(backend.requests[0].prompt_token_ids)
    assert "get_weather" not in prompt


CONVERSATION = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}},
            {"id": "b", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "sunny"}]},
]


def test_calls_and_their_answers_go_back_to_the_model():
    backend = says("It is sunny.")
    assert ask(backend, messages=CONVERSATION).json()["choices"][0]["message"]["content"] == "It is sunny."
    prompt = tokenizer().decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>' in prompt
    assert "<|im_start|>tool\nsunny<|im_end|>" in prompt


def test_an_answer_carries_the_name_of_the_function_that_was_called():
    """Some templates ask for it, and OpenAI's clients do not send it."""
    backend = says("x", TOOL_TEMPLATE + "{% for m in messages if m.role == 'tool' %}{{ m.name }} {% endfor %}")
    ask(backend, messages=CONVERSATION)
    assert tokenizer().decode(backend.requests[0].prompt_token_ids).endswith("now get_weather ")


def made(**changes) -> dict:
    function = {"name": "now", "arguments": "{}", **changes.pop("function", {})}
    return {"id": "a", "type": "function", "function": function, **changes}


def called(*calls: dict, answers: tuple[str, ...] = ()) -> list[dict]:
    tools = [{"role": "tool", "tool_call_id": answer, "content": "x"} for answer in answers]
    return [USER, {"role": "assistant", "tool_calls": list(calls)}, *tools]


DEEP = json.dumps({"a": [[]]}).replace("[]", "[" * 40 + "]" * 40)


@pytest.mark.parametrize(
    ("messages", "param", "part"),
    [
        (called(made(function={"arguments": {"a": 1}})), "messages[1].tool_calls[0].function.arguments", "string"),
        (called(made(function={"arguments": "{"})), "messages[1].tool_calls[0].function.arguments", "JSON object"),
        (called(made(function={"arguments": "[1]"})), "messages[1].tool_calls[0].function.arguments", "JSON object"),
        (called(made(function={"arguments": '{"a": NaN}'})), "messages[1].tool_calls[0].function.arguments", "JSON"),
        (called(made(function={"arguments": '{"a": "\\ud800"}'})), "messages[1].tool_calls[0].function.arguments", "J"),
        (called(made(function={"arguments": DEEP})), "messages[1].tool_calls[0].function.arguments", "levels"),
        (called(made(function={"name": "no name"})), "messages[1].tool_calls[0].function.name", ""),
        (called(made(id="")), "messages[1].tool_calls[0].id", "empty"),
        (called(made(type="custom")), "messages[1].tool_calls[0].type", "function"),
        (called(made(), made()), "messages[1]", "unique"),
        (called(made(), answers=("b",)), "messages", "names no unanswered call"),
        (called(made(), answers=("a", "a")), "messages", "entry 3"),
        ([USER, {"role": "tool", "tool_call_id": "a", "content": "x"}], "messages", "entry 1"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1]", "tool_call_id"),
        ([{**USER, "tool_call_id": "a"}], "messages[0]", "tool_call_id"),
        ([{**USER, "tool_calls": [made()]}], "messages[0]", "assistant"),
        (
            [*called(made(), answers=("a",)), USER, {"role": "tool", "tool_call_id": "a", "content": "x"}],
            "messages",
            "",
        ),
    ],
)
def test_conversations_that_do_not_hold_together_are_refused(messages, param, part):
    error = refusal(messages=messages)
    assert error["param"] == param and part in error["message"]


def function(**fields) -> dict:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("tools", "part"),
    [
        ({}, "list"),
        ([{"type": "custom", "custom": {"name": "f"}}], "entry 0.type"),
        ([{"type": "function"}], "entry 0.function must be an object"),
        ([function(name="a b")], "letters, digits"),
        ([function(name="x" * 65)], "letters, digits"),
        ([function(name=3)], "letters, digits"),
        ([function(), function()], "entry 1 has the name of entry 0"),
        ([function(description=3)], "description"),
        ([function(parameters=[])], "JSON Schema"),
        ([function(parameters={"type": "array"})], '"object"'),
        ([function(parameters={"properties": []})], "properties"),
        ([function(parameters={"properties": {"a": 3}})], "properties"),
        ([function(parameters={"required": "a"})], "required"),
        ([function(strict="yes")], "strict"),
        ([function(extra=1)], "not known"),
        ([function(parameters={"a": json.loads("[" * 40 + "]" * 40)})], "too large"),
        ([function(parameters={"enum": list(range(30_000))})], "too large"),
        ([function(name=f"f{number}") for number in range(129)], "at most 128"),
    ],
)
def test_tools_that_are_none_are_refused(tools, part):
    error = refusal(tools=tools)
    assert error["param"] == "tools" and part in error["message"]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"tool_choice": "always"}, "must be none, auto, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "not among the tools"),
        ({"tool_choice": {"type": "function", "name": "now"}}, "must be none"),
        ({"tool_choice": "required", "tools": []}, "send tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}, "tools": None}, "send tools"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(fields, part):
    error = refusal(**fields)
    assert error["param"] == "tool_choice" and part in error["message"]


def test_a_template_that_leaves_tools_out_is_refused_with_the_remedy():
    error = refusal(FakeBackend())
    assert error["param"] == "tools" and "--chat-template" in error["message"]
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    error = refusal(says("x", silent), messages=called(made(), answers=("a",)), tools=None)
    assert error["param"] == "messages" and "leaves out what tools answered" in error["message"]


def test_a_format_that_is_not_known_is_refused_until_it_is_named():
    template = "{{ tools }}" + CHAT_TEMPLATE
    error = refusal(says(CALL, template))
    assert error["param"] == "tools" and "--tool-call-parser" in error["message"]
    answer = ask(says(CALL, template, card={"tool_call_parser": "hermes"})).json()
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert "--tool-call-parser" in refusal(says(CALL, card={"tool_call_parser": "none"}))["message"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (MISTRAL_TEMPLATE, 'Hm. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Bern"}}]'),
        (MISTRAL_TEMPLATE, 'Hm. [TOOL_CALLS]get_weather[ARGS]{"city": "Bern"}'),
        (LLAMA_TEMPLATE, 'Hm. <|python_tag|>{"name": "get_weather", "parameters": {"city": "Bern"}}'),
    ],
)
@pytest.mark.parametrize("skips", [True, False])
def test_special_tokens_mark_calls_and_do_not_reach_the_client(template, text, skips):
    whole = ask(says(text, template), skip_special_tokens=skips).json()["choices"][0]["message"]
    assert whole["content"] == "Hm." and whole["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'
    assert added_up(ask(says(text, template), stream=True).chunks())["content"] == "Hm."
    broken = ask(says(text.replace("get_weather", "no_tool"), template)).json()["choices"][0]["message"]
    assert "tool_calls" not in broken and "no_tool" in broken["content"]
    assert not any(mark in broken["content"] for mark in ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "\0"))


def test_ids_fit_the_models_template():
    text = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    [call_made] = ask(says(text, MISTRAL_TEMPLATE)).json()["choices"][0]["message"]["tool_calls"]
    assert len(call_made["id"]) == 9 and call_made["id"].isalnum()


def tag(backend: FakeBackend) -> dict:
    grammar = backend.requests[-1].sampling.grammar
    assert grammar.kind == "structural_tag"
    return json.loads(grammar.source)


def test_a_required_call_is_held_to_the_tools_by_a_grammar():
    backend = says(CALL)
    assert ask(backend, tool_choice="required").json()["choices"][0]["finish_reason"] == "tool_calls"
    held = tag(backend)
    assert held["at_least_one"] and not held["stop_after_first"] and held["triggers"] == ["<tool_call>"]
    weather, now = held["structures"]
    assert weather["schema"] == WEATHER["function"]["parameters"]
    assert now["schema"]["additionalProperties"] is False, "who has no parameters has no arguments"
    assert weather["begin"] == '<tool_call>\n{"name": "get_weather", "arguments": '
    assert weather["end"] == "}\n</tool_call>"


def test_a_named_tool_is_the_only_one_and_called_once():
    backend = says(CALL)
    ask(backend, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    held = tag(backend)
    assert len(held["structures"]) == 1 and held["stop_after_first"]
    ask(backend, tool_choice="required", parallel_tool_calls=False)
    assert tag(backend)["stop_after_first"]


def test_free_calls_are_held_to_the_schema_of_strict_tools_only():
    backend = says(CALL)
    ask(backend)
    assert backend.requests[-1].sampling.grammar is None
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    ask(backend, tools=[strict, NOW])
    held = tag(backend)
    assert "at_least_one" not in held
    assert [part["schema"] for part in held["structures"]] == [strict["function"]["parameters"], {"type": "object"}]


def test_a_call_is_forced_as_a_list_where_no_grammar_writes_the_models_own_format():
    text = '[{"name": "get_weather", "arguments": {"city": "Bern"}}]'
    backend = says(text, card={"tool_call_parser": "pythonic"})
    message = ask(backend, tool_choice="required").json()["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'
    assert tag(backend)["structures"][0]["begin"] == '[{"name": "get_weather", "arguments": '


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (MISTRAL_TEMPLATE, '[TOOL_CALLS][{"name": "now", "arguments": {}}]'),
        (MISTRAL_TEMPLATE + "{# [ARGS] #}", "[TOOL_CALLS]now[ARGS]{}"),
        (LLAMA_TEMPLATE, '{"name": "now", "parameters": {}}'),
        (TOOL_TEMPLATE, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
    ],
)
def test_what_a_grammar_writes_is_what_the_parser_reads(template, text):
    backend = says(text, template)
    assert ask(backend, tool_choice="required").json()["choices"][0]["finish_reason"] == "tool_calls"
    held = tag(backend)
    structure = held["structures"][1]
    assert structure["begin"] + "{}" + structure["end"] == text and structure["begin"].startswith(*held["triggers"])


THOUGHT = "<think>\nLet me see.\n</think>\n\nIt is sunny."


def test_reasoning_is_told_apart_and_counted():
    answer = ask(says(THOUGHT, THINK_TEMPLATE)).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == "Let me see." and message["content"] == "It is sunny."
    counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert counted == len(ids("\nLet me see.\n</think>")) + 1, "from the opening tag's last token to the closing tag's"
    assert answer["usage"]["completion_tokens"] == len(ids(THOUGHT))


def test_reasoning_streams():
    reply = ask(says(THOUGHT, THINK_TEMPLATE), stream=True, tools=None)
    assert added_up(reply.chunks()) == {"content": "It is sunny.", "reasoning_content": "Let me see."}
    assert sum("reasoning_content" in c["choices"][0]["delta"] for c in reply.chunks()) > 3


def test_reasoning_that_the_template_opens_is_reasoning_from_the_first_token():
    backend = says(f"Let me see.\n</think>\n\n{CALL}", OPEN_TEMPLATE)
    message = ask(backend).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Let me see." and message["content"] is None
    assert message["tool_calls"][0]["function"]["name"] == "get_weather"


def test_reasoning_that_is_cut_off_is_no_content():
    text = "Let me see"
    [choice] = ask(says(text, OPEN_TEMPLATE), max_tokens=len(ids(text))).json()["choices"]
    assert choice["message"]["content"] is None and choice["message"]["reasoning_content"] == text
    assert choice["finish_reason"] == "length"


def test_reasoning_may_be_left_out_of_the_answer():
    answer = ask(says(THOUGHT, THINK_TEMPLATE), include_reasoning=False).json()
    assert "reasoning_content" not in answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    stays = ask(says(THOUGHT, THINK_TEMPLATE, card={"reasoning_parser": "none"}), tools=None).json()
    assert stays["choices"][0]["message"]["content"] == THOUGHT


def test_a_forced_call_has_no_reasoning_before_it():
    backend = says(CALL, OPEN_TEMPLATE)
    message = ask(backend, tool_choice="required").json()["choices"][0]["message"]
    assert message["tool_calls"] and "reasoning_content" not in message
    prompt = tokenizer().decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<think>\n\n</think>\n\n"), "what the template opened is closed"


def test_reasoning_goes_back_to_the_template():
    template = THINK_TEMPLATE + "{{ messages[1].reasoning_content if messages[1] }}"
    backend = says("x", template)
    ask(backend, messages=[USER, {"role": "assistant", "content": "a", "reasoning_content": "because"}, USER])
    assert tokenizer().decode(backend.requests[0].prompt_token_ids).endswith("because")


def test_the_embedded_model_does_not_pretend_to_know_tools():
    embedded = Tokenizer(TokenizerBundle.from_folder(Path(EMBEDDED["tandem-text"])))
    assert not embedded.shows_tools and call_format("auto", embedded.chat_template) is None


def test_tokenize_counts_the_tools():
    async def scenario():
        async with fake_gateway(says("x")) as gateway:
            plain = await call(gateway, "/tokenize", {"messages": [USER]})
            full = await call(gateway, "/tokenize", {"messages": [USER], "tools": [WEATHER]})
            wrong = await call(gateway, "/tokenize", {"prompt": "x", "tools": [WEATHER]})
            return plain.json()["count"], full.json()["count"], wrong.status

    async def unseen():
        async with fake_gateway() as gateway:
            return (await call(gateway, "/tokenize", {"messages": [USER], "tools": [WEATHER]})).status

    plain, full, wrong = asyncio.run(scenario())
    assert full > plain + 50 and wrong == 400 and asyncio.run(unseen()) == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(tools=JSON, choice=JSON, messages=st.lists(JSON, max_size=3))
def test_no_tools_and_no_messages_break_the_server(tools, choice, messages):
    async def scenario():
        async with fake_gateway(says("x")) as gateway:
            for fields in ({"tools": tools}, {"tool_choice": choice}, {"messages": [USER, *messages]}):
                reply = await call(gateway, PATH, body(**fields))
                assert reply.status in (200, 400)
                assert "error" in reply.json() or reply.status == 200

    asyncio.run(scenario())


def test_openais_client_plays_a_whole_round():
    """Over HTTP: a streamed call through the client's helper, the tool's answer back, the final words."""

    def reply(request):
        return ids("It is sunny.") if len(request.prompt_token_ids) > first_prompt else ids(TWO_CALLS)

    first_prompt = 1 << 30
    backend = FakeBackend(reply=reply, chat_template=TOOL_TEMPLATE, card=card(max_model_len=8192), tokens_per_step=2)

    async def scenario():
        nonlocal first_prompt
        async with fake_gateway(backend) as gateway:
            server = GatewayServer(gateway.app, GatewayOptions(port=0), gateway.drain)
            _, port = await server.start()
            try:
                async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                    messages = [USER]
                    asked = {"model": "tiny", "tools": [WEATHER, NOW], "stream_options": {"include_usage": True}}
                    async with client.chat.completions.stream(messages=messages, **asked) as stream:
                        kinds = [event.type async for event in stream]
                        done = await stream.get_final_completion()
                    first_prompt = len(backend.requests[0].prompt_token_ids)
                    return kinds, done, await final_words(client, messages, done)
            finally:
                await server.aclose()

    async def final_words(client, messages, done):
        message = done.choices[0].message
        messages = [*messages, message]
        for made_call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": made_call.id, "content": "sunny"})
        return await client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER, NOW])

    kinds, done, last = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= set(kinds)
    choice = done.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
    assert [made_call.function.name for made_call in choice.message.tool_calls] == ["get_weather", "now"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Zürich"}
    assert done.usage.completion_tokens == len(ids(TWO_CALLS))
    assert last.choices[0].message.content == "It is sunny."


def test_openais_client_parses_arguments_into_a_model():
    class GetWeather(BaseModel):
        city: str

    text = '<tool_call>{"name": "GetWeather", "arguments": {"city": "Bern"}}</tool_call>'

    async def scenario():
        async with fake_gateway(says(text)) as gateway:
            server = GatewayServer(gateway.app, GatewayOptions(port=0), gateway.drain)
            _, port = await server.start()
            try:
                async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
                    return await client.chat.completions.parse(
                        model="tiny", messages=[USER], tools=[openai.pydantic_function_tool(GetWeather)]
                    )
            finally:
                await server.aclose()

    done = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert done.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Bern")
