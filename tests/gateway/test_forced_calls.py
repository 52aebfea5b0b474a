"""Whatever a grammar lets a model write as a forced or strict call, the parser of that format reads as one."""

from __future__ import annotations

import json
import random

import pytest

from serve.gateway.parsing.events import Arguments, CallEnd, CallStart, merged
from serve.gateway.parsing.formats import FORMATS, LIST, call_format, make_parser
from serve.gateway.parsing.markers import SPECIAL, Spellings
from serve.gateway.tool_use import ToolUse
from serve.gateway.tools import Tool, ToolChoice
from serve.request import SamplingParams
from serve.text.grammar.grammar import Cost, Matcher
from serve.text.grammar.source import to_llguidance
from serve.text.grammar.vocabulary import Vocabulary

pytest.importorskip("llguidance")

END, CALLS, ARGS = 256, 257, 258
MARKERS = {CALLS: "[TOOL_CALLS]", ARGS: "[ARGS]"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": -9, "maximum": 99}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = (Tool("get_weather", {}, WEATHER, True), Tool("now", {}, NOTHING, False))
WRITTEN = {
    "hermes": FORMATS["hermes"],
    "llama3_json": FORMATS["llama3_json"],
    "mistral, list": FORMATS["mistral"],
    "mistral, names": call_format("auto", "[TOOL_CALLS] [ARGS]"),
    "list": LIST,
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """Every byte, an end, and two markers that are special tokens."""
    special = {"<|end|>": END, **{name: token_id for token_id, name in MARKERS.items()}}
    return Vocabulary([bytes([byte]) for byte in range(256)] + [b""] * 3, special=special, end_ids=[END])


def matcher(vocabulary: Vocabulary, use: ToolUse) -> Matcher:
    grammar = use.grammar()
    assert grammar is not None
    text = to_llguidance(grammar.kind, grammar.source, is_compact=grammar.is_compact, special=vocabulary.special)
    core = vocabulary.matcher(text)
    assert not core.is_error(), core.get_error()
    return Matcher(core, vocabulary, SamplingParams(max_tokens=10**6), Cost())


def walk(held: Matcher, picks: random.Random) -> str | None:
    """A random output as the parser sees it; None when it becomes long."""
    out = bytearray()
    for _ in range(600):
        mask = held.mask()
        if held.is_complete or mask is None:
            break
        legal = [token_id for token_id in range(259) if mask[token_id >> 3] >> (token_id & 7) & 1]
        token_id = END if END in legal else picks.choice(legal)
        assert token_id in legal
        if token_id == END:
            break
        held.accept(token_id)
        out += SPECIAL.encode() + MARKERS[token_id].encode() if token_id in MARKERS else bytes([token_id])
    else:
        return None
    return out.decode()


def calls_in(use: ToolUse, text: str) -> list[tuple[str, dict]]:
    """Names and arguments of complete calls; nothing else may be there but calls."""
    parser = make_parser(use.format, use.names, Spellings(MARKERS.values()))
    events = merged([*parser.push(text), *parser.finish()])
    assert {type(event) for event in events} <= {CallStart, Arguments, CallEnd}
    assert len(events) % 3 == 0
    return [(start.name, json.loads(told.text)) for start, told, _ in zip(*[iter(events)] * 3, strict=True)]


def check(name: str, arguments: dict) -> None:
    if name == "now":
        assert arguments == {}
    else:
        assert set(arguments) == {"city", "days"} and len(arguments["city"]) <= 6
        assert all(-9 <= day <= 99 for day in arguments["days"])


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("wanted", [None, "get_weather"])
def test_every_forced_answer_is_one_call_that_follows_its_schema(vocabulary, name, wanted):
    use = ToolUse(tools=TOOLS, choice=ToolChoice("required", wanted), format=WRITTEN[name], is_single=True)
    num_ended = 0
    for seed in range(20):
        text = walk(matcher(vocabulary, use), random.Random(seed))
        if text is None:
            continue
        num_ended += 1
        [(called, arguments)] = calls_in(use, text)
        assert wanted in (None, called)
        check(called, arguments)
    assert num_ended >= 5


@pytest.mark.parametrize("name", ["hermes", "mistral, list", "mistral, names"])
def test_a_strict_call_that_the_model_begins_by_itself_follows_its_schema(vocabulary, name):
    use = ToolUse(tools=TOOLS, choice=ToolChoice("auto"), format=WRITTEN[name], is_single=True)
    begin = use.format.around("get_weather")[0]
    assert begin.startswith(use.format.trigger)
    num_ended = 0
    for seed in range(10):
        held = matcher(vocabulary, use)
        for token_id in tokens(begin):
            held.accept(token_id)
        rest = walk(held, random.Random(seed))
        if rest is None:
            continue
        num_ended += 1
        [(called, arguments)] = calls_in(use, shown(begin) + rest)
        assert called == "get_weather"
        check(called, arguments)
    assert num_ended >= 3


def test_text_without_a_call_stays_free_beside_strict_tools(vocabulary):
    use = ToolUse(tools=TOOLS, choice=ToolChoice("auto"), format=FORMATS["hermes"])
    held = matcher(vocabulary, use)
    text = "<think>hm { [</think> It is 5 < 6."
    assert held.num_legal(tokens(text)) == len(tokens(text))


def tokens(text: str) -> list[int]:
    """Markers as the special tokens they are, the rest as bytes."""
    ids: list[int] = []
    while text:
        token_id = next((token_id for token_id, name in MARKERS.items() if text.startswith(name)), None)
        ids += text[0].encode() if token_id is None else [token_id]
        text = text[1 if token_id is None else len(MARKERS[token_id]) :]
    return ids


def shown(text: str) -> str:
    """As the detokeniser spells it for the parser."""
    for name in MARKERS.values():
        text = text.replace(name, SPECIAL + name)
    return text
