"""What each kind of `Grammar` is for llguidance: JSON with a schema in it, or its dialect of Lark.

A JSON Schema is enforced as it is written or refused: a keyword that would have no effect is an error that names it.
JSON is written with `,` and `:`, each followed by at most one space, or by one line end and some indentation. Any
whitespace at all is what JSON allows and what small models never find an end of; none at all (`is_compact`) is
cheaper, as more of the text is forced, but is not how most models were taught to write.

All of this runs in the process that may be killed for it (`process.py`): sources are other people's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

WHITESPACE = r"( |\n[ \t]{0,24})?"
"""Between two tokens of JSON: twenty-four spaces indent six levels by four."""

_SCHEMAS = frozenset(["additionalProperties", "items"])
_LISTS_OF_SCHEMAS = frozenset(["anyOf", "allOf", "oneOf", "prefixItems"])
_MAPS_OF_SCHEMAS = frozenset(["properties", "patternProperties", "$defs", "definitions"])
ENFORCED = (
    _SCHEMAS
    | _LISTS_OF_SCHEMAS
    | _MAPS_OF_SCHEMAS
    | {
        *("$ref", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "maxItems", "maxLength"),
        *("maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "pattern"),
        *("required", "type"),
    }
)
"""Keywords of JSON Schema 2020-12 that llguidance enforces, or refuses itself where it cannot."""
ANNOTATIONS = frozenset(
    (
        *("$anchor", "$comment", "$id", "$schema", "contentEncoding", "contentMediaType", "default", "deprecated"),
        *("description", "discriminator", "example", "examples", "readOnly", "title", "writeOnly"),
    )
)
"""Without effect on what is valid, by their own definition; and any name that begins with x-."""


class BadGrammar(Exception):
    """The source is not what its kind asks for. The message says what to change."""


def to_llguidance(kind: str, source: str, *, is_compact: bool, special: Mapping[str, int]) -> str:
    """The text that `LLMatcher` takes. Raises BadGrammar.

    `special`: the special tokens by name, which may stand in a structural tag.
    """
    if kind == "json_object":
        return _json({"type": "object"}, is_compact)
    if kind == "json_schema":
        return _json(_schema(_loads(source, "the schema")), is_compact)
    if kind == "regex":
        return json.dumps({"grammars": [{"lark_grammar": f"start: /{_slashes(source)}/"}]})
    if kind == "choice":
        return _lark(_choice(_loads(source, "choice")))
    if kind == "grammar":
        return _lark(_from_ebnf(source))
    if kind == "structural_tag":
        return _lark(_structural_tag(_loads(source, "structural_tag"), is_compact, special))
    raise BadGrammar(f"a grammar of kind {kind!r} is not known here")


def _lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _json(schema: dict[str, Any], is_compact: bool) -> str:
    return json.dumps({"grammars": [{"json_schema": _with_style(schema, is_compact)}]})


def _with_style(schema: dict[str, Any], is_compact: bool) -> dict[str, Any]:
    whitespace = "" if is_compact else WHITESPACE
    return {**schema, "x-guidance": {"whitespace_flexible": not is_compact, "whitespace_pattern": whitespace}}


def _loads(source: str, what: str) -> Any:
    try:
        return json.loads(source)
    except RecursionError:
        raise BadGrammar(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise BadGrammar(f"{what} is not valid JSON: {error}") from None


def _slashes(regex: str) -> str:
    """A regular expression as Lark writes it, between slashes."""
    out, is_escaped = [], False
    for char in regex:
        out.append("\\/" if char == "/" and not is_escaped else "\\n" if char == "\n" else char)
        is_escaped = char == "\\" and not is_escaped
    if is_escaped:
        raise BadGrammar("the regular expression ends in a backslash; write it twice for the character itself")
    return "".join(out)


def _quoted(text: str) -> str:
    """A string of Lark; none for the empty one, which is no terminal."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _choice(choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise BadGrammar("choice must be a list of at least one string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _from_ebnf(source: str) -> str:
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        return str(any_to_lark(source))
    except RecursionError:
        raise BadGrammar("the grammar is nested too deeply") from None
    except (GbnfToLarkError, ValueError, KeyError, IndexError) as error:
        raise BadGrammar(f"the grammar is not valid EBNF (GBNF with root ::=, or Lark with start:): {error}") from None


# -- JSON Schema -------------------------------------------------------------------------------------------------------


def _schema(root: Any) -> dict[str, Any]:
    """The schema, if it holds only what is enforced. Recursion-free: depth is the sender's choice."""
    if root is True:
        return {}
    if not isinstance(root, dict):
        raise BadGrammar("the schema must be an object, or true")
    found: list[Any] = [root]
    while found:
        schema = found.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise BadGrammar(f"a subschema is {_kind(schema)}; it must be an object, true or false")
        for keyword, value in schema.items():
            found += _subschemas(keyword, value)
    return root


def _subschemas(keyword: str, value: Any) -> list[Any]:
    """The schemas directly inside a keyword. Raises BadGrammar for a keyword that would have no effect."""
    if keyword in _SCHEMAS:
        if isinstance(value, list):
            raise BadGrammar(f"{keyword!r} is a list; write prefixItems for items by position (JSON Schema 2020-12)")
        return [value]
    if keyword in _LISTS_OF_SCHEMAS:
        if not isinstance(value, list):
            raise BadGrammar(f"{keyword!r} must be a list of schemas")
        return value
    if keyword in _MAPS_OF_SCHEMAS:
        if not isinstance(value, dict):
            raise BadGrammar(f"{keyword!r} must be an object of schemas")
        return list(value.values())
    if keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
        raise BadGrammar(f"{keyword!r} is {json.dumps(value)}; it is a number since draft 6")
    if keyword not in ENFORCED and keyword not in ANNOTATIONS and (not keyword.startswith("x-") or _is_option(keyword)):
        raise BadGrammar(f"the keyword {keyword[:64]!r} is not enforced here; leave it out, or say it another way")
    return []


def _is_option(keyword: str) -> bool:
    """llguidance reads options from the schema itself; one of them is to ignore what it cannot enforce."""
    return keyword == "x-guidance"


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")


# -- structural tags ---------------------------------------------------------------------------------------------------


def _structural_tag(tag: Any, is_compact: bool, special: Mapping[str, int]) -> str:
    """Free text with structures in it. A trigger is a lazy lexeme: where it stands the free text has ended.

    start: segment* TEXT                  segment_0: trigger_0 (rest_0 | rest_1)
    """
    triggers, structures = _tag_parts(tag)
    rules = ["%llguidance {}", r"TEXT: /(.|\n)*/"]
    for i, structure in enumerate(structures):
        schema = json.dumps(_with_style(_schema(structure["schema"]), is_compact))
        rules.append(f"body_{i}: %json {schema}")
    segments = []
    for k, trigger in enumerate(triggers):
        own = [i for i, structure in enumerate(structures) if structure["begin"].startswith(trigger)]
        if not own:
            raise BadGrammar(f"no structure begins with the trigger {trigger[:64]!r}; remove it or add one")
        if trigger in special:
            rules.append(f"trigger_{k}: TEXT <[{special[trigger]}]>")
        elif any(name in trigger for name in special):
            raise BadGrammar(f"the trigger {trigger[:64]!r} holds a special token; let it be that token alone")
        else:
            rules.append(f"trigger_{k}[lazy]: TEXT {_quoted(trigger)}")
        rests = " | ".join(
            f"({_sequence(structures[i]['begin'][len(trigger) :], special)} body_{i}"
            f" {_sequence(structures[i]['end'], special)})"
            for i in own
        )
        rules.append(f"segment_{k}: trigger_{k} ({rests})")
        segments.append(f"segment_{k}")
    whole = " | ".join(
        f"({_sequence(structure['begin'], special)} body_{i} {_sequence(structure['end'], special)})"
        for i, structure in enumerate(structures)
    )
    any_segment = f"({' | '.join(segments)})"
    has_one, has_last = bool(tag.get("at_least_one")), bool(tag.get("stop_after_first"))
    if has_one:
        rules.append(f"start: ({whole})" if has_last else f"start: ({whole}) {any_segment}* TEXT")
    else:
        rules.append(f"start: {any_segment} | TEXT" if has_last else f"start: {any_segment}* TEXT")
    return "\n".join(rules)


def _tag_parts(tag: Any) -> tuple[list[str], list[dict[str, Any]]]:
    known = {"type", "triggers", "structures", "at_least_one", "stop_after_first"}
    if not isinstance(tag, dict) or tag.get("type", "structural_tag") != "structural_tag" or tag.keys() - known:
        raise BadGrammar("structural_tag must be an object with triggers and structures")
    triggers, structures = tag.get("triggers"), tag.get("structures")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
        raise BadGrammar("triggers must be a list of at least one string")
    if not isinstance(structures, list) or not structures:
        raise BadGrammar("structures must be a list of at least one object with begin, schema and end")
    for structure in structures:
        if not isinstance(structure, dict) or structure.keys() != {"begin", "schema", "end"}:
            raise BadGrammar("a structure is an object with begin, schema and end")
        begin, end = structure["begin"], structure["end"]
        if not isinstance(begin, str) or not isinstance(end, str):
            raise BadGrammar("begin and end of a structure must be strings")
        if sum(begin.startswith(trigger) for trigger in triggers) != 1:
            raise BadGrammar(f"the structure that begins with {begin[:64]!r} must begin with exactly one trigger")
    return triggers, structures


def _sequence(text: str, special: Mapping[str, int]) -> str:
    """A fixed text, in which the names of special tokens stand for these tokens."""
    parts, at = [], 0
    while at < len(text):
        hits = [(text.find(name, at), -len(name), name) for name in special if name and text.find(name, at) >= 0]
        if not hits:
            break
        start, _, name = min(hits)
        parts += [_quoted(text[at:start]), f"<[{special[name]}]>"]
        at = start + len(name)
    return " ".join(part for part in [*parts, _quoted(text[at:])] if part)
