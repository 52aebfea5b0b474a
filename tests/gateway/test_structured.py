"""`response_format` and `structured_outputs` over HTTP: what reaches the backend, what is refused and how."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_fakes import TOOL_TEMPLATE, FakeBackend, call, fake_gateway

from serve.gateway.field import PATHS
from serve.gateway.fields import FIELDS
from serve.request import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BASE = {
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "completions": {"model": "tiny", "prompt": "hi", "max_tokens": 4},
}
TAG = {"triggers": ["<a>"], "structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}]}


def ask(endpoint: str, **fields):
    """(answer, what the backend was asked to hold to)."""

    async def scenario():
        backend = FakeBackend(chat_template=TOOL_TEMPLATE)
        async with fake_gateway(backend) as gateway:
            answer = await call(gateway, PATHS[endpoint], BASE[endpoint] | fields)
        return answer, [request.sampling.grammar for request in backend.requests]

    return asyncio.run(asyncio.wait_for(scenario(), 60))


def schema_format(**values) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, **values}}


@pytest.mark.parametrize("endpoint", BASE)
@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": schema_format(strict=True, description="d")}, "json_schema", SCHEMA),
        ({"response_format": schema_format(strict=False)}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["yes", "nö"]}}, "choice", ["yes", "nö"]),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"'),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "structural_tag", TAG),
        ({"response_format": {"type": "structural_tag", **TAG}}, "structural_tag", {"type": "structural_tag", **TAG}),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, "regex", "a"),
    ],
)
def test_each_way_to_ask_becomes_one_grammar(endpoint, fields, kind, source):
    answer, (grammar,) = ask(endpoint, **fields)
    assert answer.status == 200
    assert isinstance(grammar, Grammar) and grammar.kind == kind and grammar.param in fields
    assert (grammar.source if isinstance(source, str) else json.loads(grammar.source)) == source
    assert not grammar.is_compact


def test_whitespace_can_be_ruled_out():
    _, (grammar,) = ask("chat", structured_outputs={"json": SCHEMA, "disable_any_whitespace": True})
    assert grammar is not None and grammar.is_compact


@pytest.mark.parametrize("value", [None, {"type": "text"}])
def test_text_asks_for_nothing(value):
    answer, grammars = ask("chat", response_format=value)
    assert answer.status == 200 and grammars == [None]


BAD = [
    ("response_format", {"type": "xml"}, "one of"),
    ("response_format", "json_object", "one of"),
    ("response_format", {"type": "json_object", "schema": SCHEMA}, "leave the rest out"),
    ("response_format", {"type": "json_schema"}, "json_schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}, "schema must be an object"),
    ("response_format", schema_format(name="two words"), "letters"),
    ("response_format", schema_format(strict="yes"), "true or false"),
    ("structured_outputs", {}, "exactly one"),
    ("structured_outputs", {"json": SCHEMA, "regex": "a"}, "exactly one"),
    ("structured_outputs", {"json_object": False}, "exactly one"),
    ("structured_outputs", {"regex": 3}, "string"),
    ("structured_outputs", {"choice": []}, "1 to"),
    ("structured_outputs", {"choice": [1]}, "strings"),
    ("structured_outputs", {"choice": ["a"] * 10_001}, "1 to 10000"),
    ("structured_outputs", {"json": [SCHEMA]}, "JSON Schema"),
    ("structured_outputs", {"regex": "a", "whitespace_pattern": " "}, "disable_any_whitespace"),
    ("structured_outputs", {"json": SCHEMA, "disable_additional_properties": True}, "additionalProperties"),
    ("structured_outputs", {"regexp": "a"}, "leave the rest out"),
    ("structured_outputs", {"json": {"enum": [[i] for i in range(60_000)]}}, "too large"),
    ("guided_json", SCHEMA, "structured_outputs with json"),
    ("guided_regex", "a", "structured_outputs with regex"),
    ("guided_choice", ["a"], "structured_outputs with choice"),
    ("guided_grammar", "a", "structured_outputs with grammar"),
    ("guided_decoding_backend", "xgrammar", "leave it out"),
]


@pytest.mark.parametrize("endpoint", BASE)
@pytest.mark.parametrize(("field", "value", "says"), BAD)
def test_a_wrong_value_is_refused_by_its_field_with_the_remedy(endpoint, field, value, says):
    answer, grammars = ask(endpoint, **{field: value})
    error = answer.json()["error"]
    assert answer.status == 400 and grammars == []
    assert error["param"] == field and says in error["message"] and field in error["message"]


def test_two_wishes_at_once_are_refused():
    answer, _ = ask("chat", response_format={"type": "json_object"}, structured_outputs={"regex": "a"})
    assert answer.status == 400 and answer.json()["error"]["param"] == "response_format"


def test_a_format_that_rules_out_tool_calls_is_refused_beside_tools():
    tools = FIELDS["chat"]["tools"].example
    answer, _ = ask("chat", tools=tools, response_format={"type": "json_object"})
    assert answer.status == 400 and "tool_choice" in answer.json()["error"]["message"]
    answer, (grammar,) = ask("chat", tools=tools, tool_choice="none", response_format={"type": "json_object"})
    assert answer.status == 200 and grammar is not None
