"""Calls and reasoning are found in generated text whatever the cuts, in linear time; what is no call stays text."""

from __future__ import annotations

import itertools
import json
import random
import sys
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.gateway.parsing.events import Arguments, CallEnd, CallStart, Content, Parsed, Reasoning, merged
from serve.gateway.parsing.formats import (
    ALIASES,
    FORMATS,
    call_format,
    make_parser,
    reasoning_format,
    stage_of,
)
from serve.gateway.parsing.json_scanner import MAX_DEPTH, JsonScanner
from serve.gateway.parsing.markers import SPECIAL, MarkerFinder, Spellings
from serve.gateway.parsing.reasoning import Stage
from serve.options import ModelOptions

NAMES = frozenset(["f", "g", "get-x"])
CALLS, TOOL_ARGS, TAG = SPECIAL + "[TOOL_CALLS]", SPECIAL + "[ARGS]", SPECIAL + "<|python_tag|>"
SPECIALS = {"mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), "llama3_json": ("<|python_tag|>",)}


def parse(name: str, text: str, cuts: list[int] | None = None, **options: Any) -> list[Parsed]:
    parser = make_parser(FORMATS[name], NAMES, Spellings(SPECIALS.get(name, ())), **options)
    events: list[Parsed] = []
    ends = [*sorted(cuts or []), len(text)]
    for start, end in zip([0, *ends], ends, strict=False):
        events += parser.push(text[start:end])
    return merged([*events, *parser.finish()])


def call(name: str, arguments: str) -> list[Parsed]:
    return [CallStart(name), Arguments(arguments), CallEnd()]


NESTED = '{"a": [1, {"b": "}]"}], "c": "x\\"y\\\\", "ü": "日本 \\u00e9 🎉", "n": -1.5e+3, "z": [null, true, false, {}]}'

READ = [
    ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>', call("f", NESTED)),
    (
        "hermes",
        'Sure.\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"arguments": {"q": 1}, '
        '"id": 3, "name": "g"}</tool_call>\n',
        [Content("Sure."), *call("f", "{}"), *call("g", '{"q": 1}')],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', call("f", "{}")),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>\n\nDone.', [*call("f", "{}"), Content("\n\nDone.")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', call("f", '{"a": "x\\ny"}')),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', call("f", '{"a": 1}')),
    (
        "llama3_json",
        ' {"name": "f", "parameters": {}}; {"name": "get-x", "parameters": {"a": ";"}}\n',
        [*call("f", "{}"), *call("get-x", '{"a": ";"}')],
    ),
    ("llama3_json", TAG + '{"name": "f", "parameters": {"a": 1}}', call("f", '{"a": 1}')),
    ("llama3_json", "Wait: " + TAG + '{"name": "f", "arguments": {}}', [Content("Wait:"), *call("f", "{}")]),
    (
        "pythonic",
        "[f(a=1, b=\"x\\n'é\", c=[-.5, 2., {'k': None,},], d=True), g(), get-x( y = '\\U0001F389\\x41' )]",
        [
            *call("f", '{"a": 1, "b": "x\\n\'é", "c": [-0.5, 2.0, {"k": null}], "d": true}'),
            *call("g", "{}"),
            *call("get-x", '{"y": "\\ud83c\\udf89\\u0041"}'),
        ],
    ),
    ("pythonic", "<|python_start|>[f(a='\"q\"')]", call("f", '{"a": "\\"q\\""}')),
    (
        "mistral",
        CALLS + ' [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}, {"name": "g", "arguments": {}}]',
        [*call("f", '{"a": 1}'), *call("g", "{}")],
    ),
    (
        "mistral",
        f'Hm.{CALLS}f{TOOL_ARGS}{NESTED}{CALLS}g{SPECIAL}[CALL_ID]123456789{TOOL_ARGS}{{}}',
        [Content("Hm."), *call("f", NESTED), *call("g", "{}")],
    ),
    ("mistral", CALLS + 'f{"a": 1}', call("f", '{"a": 1}')),
]  # fmt: skip

NO_CALLS = [
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> hi'),
    ("hermes", "<tool_call>not json</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "argum'),
    ("hermes", "use <tool_call"),
    ("hermes", " a  \n"),
    ("hermes", '{"name": "f", "arguments": {}}'),
    ("llama3_json", '{"name": "Bob", "parameters": {"a": 1}}'),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", 'It is {"name": "f", "parameters": {}}'),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[]"),
    ("pythonic", "[f] is a list"),
    ("mistral", "[TOOL_CALLS] is a token"),
    ("mistral", "f[ARGS]{}"),
]


@pytest.mark.parametrize(("name", "text", "expected"), READ)
def test_calls_are_read_and_their_arguments_are_json(name, text, expected):
    events = parse(name, text)
    assert events == expected
    for event in events:
        if isinstance(event, Arguments):
            assert isinstance(json.loads(event.text), dict)


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_is_no_call_stays_content_as_it_was_written(name, text):
    assert parse(name, text) == [Content(text)]


@pytest.mark.parametrize(("name", "text"), [*((name, text) for name, text, _ in READ), *NO_CALLS])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_cuts_change_nothing(name, text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert parse(name, text, cuts) == parse(name, text) == parse(name, text, list(range(len(text))))


ALPHABET = [
    "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": 1}', "{", "}", "[", "]", '"', "\\", ",", ";",
    " ", "\n", "f(", "a=", "'x'", ")", "1", "x", CALLS, TOOL_ARGS, TAG, "[TOOL_CALLS]", "<think>", "</think>", "-", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.sampled_from(ALPHABET), max_size=30), seed=st.integers(0, 9), reasons=st.booleans())
def test_any_text_is_read_the_same_however_it_is_cut(name, parts, seed, reasons):
    # whole markers of special tokens come in one piece: tokens are not cut
    stage = Stage.UNKNOWN if reasons else None
    shown = [SPECIAL + marker for marker in SPECIALS.get(name, ())]
    text = "".join(part for part in parts if part in shown or SPECIAL not in part)
    picks = random.Random(seed)
    cuts = [index for index in range(len(text)) if picks.random() < 0.4]
    whole = parse(name, text, stage=stage)
    assert parse(name, text, cuts, stage=stage) == whole == parse(name, text, list(range(len(text))), stage=stage)
    assert SPECIAL not in "".join(getattr(event, "text", "") for event in whole if isinstance(event, Content))
    ended = [event for event in whole if isinstance(event, CallEnd)]
    assert len(ended) <= sum(isinstance(event, CallStart) for event in whole)
    for event, following in itertools.pairwise(whole):
        if isinstance(event, Arguments) and isinstance(following, CallEnd):
            assert isinstance(json.loads(event.text), dict)


@settings(max_examples=150, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    ),
    is_ascii=st.booleans(),
)
def test_arguments_come_out_as_they_went_in(arguments, is_ascii):
    written = json.dumps(arguments, ensure_ascii=is_ascii)
    for name, before, after in (
        ("hermes", '<tool_call>{"name": "f", "arguments": ', "}</tool_call>"),
        ("llama3_json", '{"name": "f", "parameters": ', "}"),
        ("mistral", CALLS + f"f{TOOL_ARGS}", ""),
    ):
        assert parse(name, before + written + after) == call("f", written)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)  # fmt: skip
def test_pythons_own_way_of_writing_values_is_read(arguments):
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    start, *told, end = parse("pythonic", f"[f({written})]")
    assert (start, end) == (CallStart("f"), CallEnd())
    assert json.loads("".join(event.text for event in told)) == arguments


@pytest.mark.parametrize(
    ("name", "text", "told", "rest"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> hi', '{"a": oops}}', " hi"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_', '{"a": oops}}</tool_', None),
        ("llama3_json", '{"name": "f", "parameters": {"a": 01}}', '{"a": 01}}', None),
        ("pythonic", "[f(a=1, b=foo)]", '{"a": 1, "b": foo)]', None),
        ("pythonic", "[f(a=1, a=2)]", '{"a": 1, a=2)]', None),
        ("mistral", CALLS + f"f{TOOL_ARGS}{{1}}", "{1}", None),
    ],
)
def test_arguments_that_break_are_told_as_they_were_written(name, text, told, rest):
    expected = [CallStart("f"), Arguments(told), *([Content(rest)] if rest else [])]
    assert parse(name, text) == expected, "and such a call has no end"


@pytest.mark.parametrize(("name", "text", "_"), READ)
def test_a_call_that_is_cut_off_has_no_end_and_what_was_no_call_yet_is_content(name, text, _):
    for end in range(len(text)):
        events = parse(name, text[:end])
        starts = sum(isinstance(event, CallStart) for event in events)
        ends = sum(isinstance(event, CallEnd) for event in events)
        assert starts - ends in (0, 1)
        if not starts:
            assert "".join(event.text for event in events) in (text[:end], text[:end].replace(SPECIAL, ""), "".join(
                event.text for event in events if isinstance(event, Content)
            ))  # fmt: skip


def test_arguments_deeper_than_the_bound_break():
    deep = '{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}"
    assert CallEnd() not in parse("hermes", f'<tool_call>{{"name": "f", "arguments": {deep}}}</tool_call>')
    literal = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    assert CallEnd() not in parse("pythonic", f"[f(a={literal})]")


def test_content_comes_as_soon_as_it_can_be_nothing_else():
    parser = make_parser(FORMATS["hermes"], NAMES, Spellings())
    assert parser.push("Hello <") == [Content("Hello")]
    assert parser.push("b>") == [Content(" <b>")]


def test_arguments_come_as_they_are_written():
    parser = make_parser(FORMATS["hermes"], NAMES, Spellings())
    parser.push('<tool_call>{"name": "f", "arguments": {"text": "')
    assert parser.push("once upon") == [Arguments("once upon")]
    parser = make_parser(FORMATS["pythonic"], NAMES, Spellings())
    parser.push("[f(text='")
    assert parser.push("once upon") == [Arguments("once upon")]


@pytest.mark.parametrize(
    ("stage", "text", "expected"),
    [
        (Stage.UNKNOWN, "<think>\nhm\n\nso\n</think>\n\nYes.", [Reasoning("hm\n\nso"), Content("Yes.")]),
        (Stage.UNKNOWN, "Yes. <think> is a tag", [Content("Yes. <think> is a tag")]),
        (Stage.UNKNOWN, "\n <thin", [Content("\n <thin")]),
        (Stage.EXPECTED, "hm</think>Yes.", [Reasoning("hm"), Content("Yes.")]),
        (Stage.EXPECTED, "<think>hm</think>Yes.", [Reasoning("hm"), Content("Yes.")]),
        (Stage.EXPECTED, "hm, still </thin", [Reasoning("hm, still </thin")]),
        (Stage.ANSWER, "<think>x</think>", [Content("<think>x</think>")]),
        (
            Stage.UNKNOWN,
            '<think>call <tool_call>{"name": "f"}</tool_call>?</think><tool_call>{"name": "g"}</tool_call>',
            [Reasoning('call <tool_call>{"name": "f"}</tool_call>?'), *call("g", "{}")],
        ),
    ],
)
def test_reasoning_is_split_from_the_answer(stage, text, expected):
    assert parse("hermes", text, stage=stage) == expected == parse("hermes", text, list(range(len(text))), stage=stage)


def test_a_parser_says_while_it_reasons():
    parser = make_parser(None, (), Spellings(), stage=Stage.UNKNOWN)
    states = []
    for text in ("<think>", "hm", "</think>", "Yes"):
        parser.push(text)
        states.append(parser.is_reasoning)
    assert states == [True, True, False, False]


def test_special_tokens_that_mark_nothing_do_not_reach_the_client():
    shown = make_parser(FORMATS["mistral"], NAMES, Spellings(SPECIALS["mistral"], hides=False))
    text = f"a{TOOL_ARGS}b{CALLS}c"
    assert parse("mistral", text) == [Content("abc")]
    assert merged([*shown.push(text), *shown.finish()]) == [Content("a[ARGS]b[TOOL_CALLS]c")]


HOSTILE = [
    "<tool_call>", "<", "<tool_cal", "{", '{"', '{"a":', "[", "\\", '"', " ", "\n", "x", "</tool_call>", CALLS, "f(",
    "[f(", "[f(a=", ";", '{"name": "f"}', '{"name": "f", "arguments": {}}', "<think>", "</think>", TAG, "a=1,",
]  # fmt: skip
HEADS = [
    "",
    '<tool_call>{"name": "f", "arguments": {"a": "', '<tool_call>{"arguments": {"a": "', '{"x": "', "[f(a='", "[f(a=[",
    CALLS + "f" + TOOL_ARGS + '{"a": [', CALLS + "[", "<think>", '<tool_call>{"name": "f", "arguments": {1', "[f(a=1",
]  # fmt: skip


def num_lines(name: str, text: str, size: int) -> int:
    """Lines executed in the parsers for a text in pieces of `size`."""
    count = 0

    def local(frame, event, arg):
        nonlocal count
        count += event == "line"
        return local

    def trace(frame, event, arg):
        return local if "/parsing/" in frame.f_code.co_filename else None

    parser = make_parser(FORMATS[name], NAMES, Spellings(SPECIALS.get(name, ())), stage=Stage.UNKNOWN)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for start in range(0, len(text), size):
            parser.push(text[start : start + size])
        parser.finish()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 7, 1 << 30])
def test_work_is_linear_in_the_text(name, size):
    for head in HEADS:
        for part in HOSTILE:
            small, large = (num_lines(name, head + part * (num // len(part)), size) for num in (100, 400))
            assert large < 4.6 * small + 400, (head, part)


@pytest.mark.parametrize("name", FORMATS)
def test_a_million_hostile_characters_pass(name):
    for head, part in (("", "<"), (HEADS[1], "\\n"), ("[f(a='", "x"), ("", CALLS), ("", " "), ("[f(a=", "[")):
        text = head + part * (1_000_000 // len(part))
        parser = make_parser(FORMATS[name], NAMES, Spellings(SPECIALS.get(name, ())), stage=Stage.UNKNOWN)
        for start in range(0, len(text), 1000):
            parser.push(text[start : start + 1000])
        parser.finish()


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('{}[]",:0123456789.eE+-truefalsn \\u\n'), max_size=24))
def test_the_scanner_takes_what_python_takes(text):
    """Up to Python's NaN and lone control characters, and where the first value ends."""
    scanner, out = JsonScanner(), list[str]()
    at = scanner.take(text + " ,", 0, out)
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text, len(text) - len(text.lstrip()))
    except ValueError:
        assert not scanner.is_done or text.strip() == ""
        return
    if scanner.is_done:
        assert at == end and json.loads("".join(out)) == value
    else:
        assert text.lstrip()[:1] in "0123456789-"  # Python stops in front of a broken end of a number: 1.x is 1


def test_markers_are_found_across_cuts():
    for cuts in range(1 << 9):
        finder, text, seen = MarkerFinder(("<ab>", "<abc>")), "x<<ab<abc>", []
        ends = [index + 1 for index in range(9) if cuts >> index & 1] + [len(text)]
        for start, end in zip([0, *ends], ends, strict=False):
            piece, at = text[start:end], 0
            while at < len(piece):
                before, marker, at = finder.find(piece, at)
                seen += [*before, *([marker] if marker else [])]
        assert seen == [*"x<<ab", "<abc>"] and finder.finish() == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<", "<tool_", "call>", "</tool_call>", "x", " "]), max_size=40))
def test_a_finder_holds_back_less_than_a_marker(parts):
    """So each character is looked at a bounded number of times."""
    finder = MarkerFinder(("<tool_call>", "</tool_call>"))
    for part in parts:
        at = 0
        while at < len(part):
            _, _, at = finder.find(part, at)
        assert len(finder._held) < len("</tool_call>")


def test_every_format_can_be_named_as_in_vllm():
    hints = typing.get_type_hints(ModelOptions)
    assert set(typing.get_args(hints["tool_call_parser"])) == {"auto", "none", *FORMATS, *ALIASES}
    assert all(call_format(name, "") is not None for name in (*FORMATS, *ALIASES))
    assert call_format("none", "<tool_call>") is None
    for name in set(typing.get_args(hints["reasoning_parser"])) - {"auto", "none"}:
        assert reasoning_format(name, "") == name


def test_where_reasoning_begins_is_told_from_the_prompts_end():
    assert stage_of("<|im_start|>assistant\n", "qwen3") is Stage.UNKNOWN
    assert stage_of("<|im_start|>assistant\n<think>\n", "qwen3") is Stage.EXPECTED
    assert stage_of("<think>\n\n</think>\n\n", "deepseek_r1") is Stage.ANSWER
    assert stage_of("<|im_start|>assistant\n", "deepseek_r1") is Stage.EXPECTED
