"""Forced tool calls from the real engine, over HTTP, with the real client: a random model cannot but call right."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from chat_templates import QWEN2_5
from serving import Serving, serving
from tiny import tiny_folder

CITIES = ["Bern", "Zürich"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": CITIES}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("llguidance", reason="grammars are not checked without it")
    path: Path = tmp_path_factory.mktemp("models")
    template = path / "template.jinja"
    template.write_text(QWEN2_5)
    folder = tiny_folder(path, "qwen3", max_position_embeddings=4096)
    arguments = ("--no-ray", "--threads", "1", "--served-model-name", "tiny", "--chat-template", str(template))
    with serving(str(folder), *arguments) as running:
        yield running


def ask(server: Serving, **fields):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "Weather?"}]
    fields = {"messages": messages, "tools": [WEATHER, NOW], "max_tokens": 200, **fields}
    return client.chat.completions.create(model="tiny", **fields)


def check(function) -> None:
    arguments = json.loads(function.arguments)
    if function.name == "now":
        assert arguments == {}
    else:
        assert arguments["city"] in CITIES and 1 <= arguments["days"] <= 7 and len(arguments) == 2


def test_a_named_call_follows_its_schema(server):
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(4):
        [choice] = ask(server, tool_choice=named, seed=seed).choices
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert call.function.name == "get_weather"
        check(call.function)


def test_a_required_call_is_a_call_of_one_of_the_tools(server):
    for seed in range(4):
        [choice] = ask(server, tool_choice="required", parallel_tool_calls=False, seed=seed).choices
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        check(call.function)


def test_streamed_and_whole_calls_are_equal(server):
    fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    [whole] = ask(server, **fields).choices[0].message.tool_calls
    parts = [part for chunk in ask(server, **fields, stream=True) for part in chunk.choices[0].delta.tool_calls or ()]
    assert parts[0].function.name == whole.function.name and len(parts) > 1
    assert "".join(part.function.arguments for part in parts) == whole.function.arguments


def test_a_schema_that_no_grammar_can_hold_is_refused(server):
    odd = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {"required": ["a"]}}}}
    with pytest.raises(openai.BadRequestError) as it:
        ask(server, tools=[odd], tool_choice="required")
    assert it.value.param == "tools"
    assert ask(server, tools=[odd], max_tokens=4).choices, "in auto it only describes the tool"
