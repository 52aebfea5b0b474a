"""What is enforced, what is refused by name, and how each kind is written for the matcher."""

from __future__ import annotations

import json
from functools import cache

import pytest

from serve.request import SamplingParams
from serve.text.grammar.grammar import Cost, Matcher
from serve.text.grammar.source import ANNOTATIONS, ENFORCED, BadGrammar, to_llguidance
from serve.text.grammar.vocabulary import Vocabulary

pytest.importorskip("llguidance")

SPECIAL = {"<|end|>": 256, "[CALL]": 257}


@cache
def vocabulary() -> Vocabulary:
    """Every byte is a token, and its value the id."""
    return Vocabulary([bytes([byte]) for byte in range(256)] + [b""] * 2, special=SPECIAL, end_ids=[256])


def text_of(kind: str, source: object, *, is_compact: bool = False) -> str:
    source = source if isinstance(source, str) else json.dumps(source)
    return to_llguidance(kind, source, is_compact=is_compact, special=SPECIAL)


def accepts(kind: str, source: object, output: str | list[int], **options: bool) -> bool:
    """Whether the grammar allows exactly this output and then an end."""
    core = vocabulary().matcher(text_of(kind, source, **options))
    assert not core.is_error(), core.get_error()
    matcher = Matcher(core, vocabulary(), SamplingParams(max_tokens=10**6), Cost())
    ids = list(output.encode()) if isinstance(output, str) else output
    if matcher.num_legal(ids) < len(ids):
        return False
    for token_id in ids:
        matcher.accept(token_id)
    mask = matcher.mask()
    return matcher.is_complete or (mask is not None and bool(mask[256 >> 3] & 1))


PAIR = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("kind", "source", "output", "is_allowed"),
    [
        ("json_object", "", '{"x": [1, {"y": null}]}', True),
        ("json_object", "", "[1]", False),
        ("json_schema", PAIR, '{"a": 1, "b": [true]}', True),
        ("json_schema", PAIR, '{"b": [true]}', False),
        ("json_schema", PAIR, '{"a": 1, "c": 2}', False),
        ("json_schema", "true", "[1]", True),
        ("json_schema", {"type": "integer", "multipleOf": 3}, "7", False),
        ("json_schema", {"type": "object", "minProperties": 2}, '{"a": 1}', False),
        ("json_schema", {"$ref": "#/$defs/s", "maxLength": 2, "$defs": {"s": {"type": "string"}}}, '"abc"', False),
        ("regex", "[a-z]+/[0-9]{2}", "ab/12", True),
        ("regex", "^[a-z]+$", "ab1", False),
        ("regex", r"a\/b\\", "a/b\\", True),
        ("choice", ["yes", "no, never", 'a "b" \\ \n ü😀'], 'a "b" \\ \n ü😀', True),
        ("choice", ["yes", "no"], "ye", False),
        ("choice", ["", "no"], "", True),
        ("grammar", 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"\n', "1+(2+34)", True),
        ("grammar", 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"\n', "1+(2", False),
        ("grammar", 'start: "a" INT\nINT: /[0-9]+/\n', "a42", True),
    ],
)
def test_the_output_is_what_its_grammar_says(kind, source, output, is_allowed):
    assert accepts(kind, source, output) is is_allowed


def test_whitespace_of_json_is_bounded():
    assert accepts("json_schema", PAIR, '{\n  "a": 1,\n  "b": [\n    true\n  ]\n}')
    assert accepts("json_schema", PAIR, '{"a":1,"b":[true]}')
    assert not accepts("json_schema", PAIR, '{"a":  1}')
    assert not accepts("json_schema", PAIR, '{\n\n"a": 1}')
    assert not accepts("json_schema", PAIR, "{\n" + " " * 100 + '"a": 1}')


def test_compact_json_has_no_whitespace():
    assert accepts("json_schema", PAIR, '{"a":1,"b":[true]}', is_compact=True)
    assert not accepts("json_schema", PAIR, '{"a": 1}', is_compact=True)


@pytest.mark.parametrize(
    "keyword",
    [
        *("not", "if", "then", "uniqueItems", "contains", "dependentRequired", "propertyNames"),
        *("unevaluatedProperties", "additionalItems", "dependencies", "nullable", "$dynamicRef"),
        *("maxLenght", "x-guidance"),
    ],
)
def test_a_keyword_that_would_have_no_effect_is_refused_by_name(keyword):
    for schema in ({keyword: {}}, {"properties": {"a": {"items": {"anyOf": [{keyword: {}}]}}}}):
        with pytest.raises(BadGrammar, match=f"'{keyword.replace('$', '.')}'"):
            text_of("json_schema", schema)


def test_annotations_and_names_of_properties_are_no_keywords():
    schema = {"title": "t", "x-note": 1, "properties": {"not": {"default": {"if": 1}}}, "enum": [{"contains": 1}]}
    text_of("json_schema", schema)
    assert not ENFORCED & ANNOTATIONS


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "false", "must be an object"),
        ("json_schema", [1], "must be an object"),
        ("json_schema", {"items": [{}]}, "prefixItems"),
        ("json_schema", {"properties": {"a": 3}}, "a number"),
        ("json_schema", {"exclusiveMinimum": True}, "draft 6"),
        ("json_schema", "[" * 100_000, "nested too deeply"),
        ("regex", "a\\", "backslash"),
        ("choice", [], "at least one"),
        ("choice", [1], "string"),
        ("grammar", "root ::= (", "EBNF"),
        ("structural_tag", {"triggers": []}, "at least one string"),
        ("structural_tag", {"triggers": ["<a"], "structures": [{"begin": "b", "schema": {}, "end": ""}]}, "trigger"),
    ],
)
def test_a_bad_source_is_refused_with_the_remedy(kind, source, says):
    with pytest.raises(BadGrammar, match=says):
        text_of(kind, source)


CALLS = {
    "triggers": ["<tool_call>"],
    "structures": [
        {"begin": f'<tool_call>{{"name": "{name}", "arguments": ', "schema": PAIR, "end": "}</tool_call>"}
        for name in ("f", "g")
    ],
}
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("options", "output", "is_allowed"),
    [
        ({}, "just text < and <tool", True),
        ({}, f"text {CALL} more {CALL}", True),
        ({}, "text <tool_call> more", False),
        ({}, 'text <tool_call>{"name": "h"', False),
        ({"at_least_one": True}, "text", False),
        ({"at_least_one": True}, f"{CALL}\n{CALL} text", True),
        ({"stop_after_first": True}, "text", True),
        ({"stop_after_first": True}, f"text {CALL}", True),
        ({"stop_after_first": True}, f"{CALL} text", False),
        ({"at_least_one": True, "stop_after_first": True}, CALL, True),
        ({"at_least_one": True, "stop_after_first": True}, f" {CALL}", False),
    ],
)
def test_structures_stand_in_free_text_behind_their_trigger(options, output, is_allowed):
    assert accepts("structural_tag", {**CALLS, **options}, output) is is_allowed


def test_the_name_of_a_special_token_in_a_tag_is_that_token():
    tag = {"triggers": ["[CALL]"], "structures": [{"begin": "[CALL]f", "schema": {"type": "null"}, "end": ""}]}
    assert accepts("structural_tag", tag, [*b"ok ", 257, *b"fnull"])
    assert not accepts("structural_tag", tag, [257, *b"gnull"])
    assert accepts("structural_tag", tag, [*b"[CALL]g"])  # the characters are text like any other
