"""`response_format` of OpenAI and `structured_outputs` of vLLM: what the output must be, as one `Grammar`.

Shapes and sizes are checked here. What a schema or a grammar means is found out where the model is, before anything is
generated (`serve/text/grammar/compiler.py`), so that a bad one is refused as any other bad value.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from serve.errors import InvalidRequest
from serve.gateway.json_limits import is_within
from serve.gateway.values import wrong
from serve.request import Grammar

MAX_VALUES = 50_000
"""Of a schema: objects, lists and what is in them."""
MAX_SCHEMA_DEPTH = 64
"""Each level of an object is two of these."""
MAX_CHOICES = 10_000
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def constraint(body: Any, tools: str | None = None) -> Grammar | None:
    """What `body` asks its output to be; `tools` names a field that may ask for something else. Raises
    InvalidRequest for two wishes at once."""
    asked = [("response_format", body.response_format), ("structured_outputs", body.structured_outputs)]
    grammars = [(name, grammar) for name, grammar in asked if isinstance(grammar, Grammar)]
    if len(grammars) > 1:
        raise InvalidRequest(
            "response_format and structured_outputs both constrain the output; leave one out", param="response_format"
        )
    if grammars and tools is not None:
        name = grammars[0][0]
        raise InvalidRequest(
            f"{name} would keep the model from calling a tool; leave it out, or set tool_choice to none", param=name
        )
    return grammars[0][1] if grammars else None


def _response_format(value: Any) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _FORMATS:
        raise wrong(f"must be an object whose type is one of {', '.join(_FORMATS)}")
    if kind == "structural_tag":
        return _grammar("structural_tag", _dumped(value), "response_format")
    surplus = value.keys() - ({"type", "json_schema"} if kind == "json_schema" else {"type"})
    if surplus:
        raise wrong(f"holds more than type {kind} knows; leave the rest out")
    if kind == "text":
        return None
    if kind == "json_object":
        return _grammar("json_object", "", "response_format")
    spec = value.get("json_schema")
    if not isinstance(spec, dict) or spec.keys() - {"name", "description", "schema", "strict"}:
        raise wrong(".json_schema must be an object with name, schema and, if wanted, description and strict")
    if not isinstance(spec.get("name"), str) or not _NAME.fullmatch(spec["name"]):
        raise wrong(".json_schema.name must be 1 to 64 letters, digits, _ or -")
    if not isinstance(spec.get("description", ""), str | None):
        raise wrong(".json_schema.description must be a string")
    if spec.get("strict") not in (None, True, False):
        raise wrong(".json_schema.strict must be true or false; the schema is enforced either way")
    if not isinstance(spec.get("schema"), dict):
        raise wrong(".json_schema.schema must be an object")
    return _grammar("json_schema", _dumped(spec["schema"]), "response_format")


def _structured_outputs(value: Any) -> Grammar | None:
    if not isinstance(value, dict):
        raise wrong("must be an object")
    if value.get("whitespace_pattern") is not None:
        raise wrong(".whitespace_pattern is not supported; disable_any_whitespace true leaves no whitespace at all")
    if value.get("disable_additional_properties"):
        raise wrong(".disable_additional_properties is not supported; write additionalProperties false in the schema")
    flags = {"disable_any_whitespace", "disable_fallback", "disable_additional_properties", "whitespace_pattern"}
    if value.keys() - flags - set(_CONSTRAINTS):
        raise wrong(f"knows {', '.join(_CONSTRAINTS)} and disable_any_whitespace; leave the rest out")
    for flag in ("disable_any_whitespace", "disable_fallback", "json_object"):
        if value.get(flag) not in (None, True, False):
            raise wrong(f".{flag} must be true or false")
    given = [name for name in _CONSTRAINTS if value.get(name) not in (None, False)]
    if len(given) != 1:
        raise wrong(f"holds {len(given)} constraints; give exactly one of {', '.join(_CONSTRAINTS)}")
    (name,) = given
    return _grammar(*_constraint(name, value[name]), "structured_outputs", bool(value.get("disable_any_whitespace")))


def _constraint(name: str, value: Any) -> tuple[Any, str]:
    """(kind, source)."""
    if name == "json_object":
        return "json_object", ""
    if name == "json":
        if not isinstance(value, dict | str):
            raise wrong(".json must be a JSON Schema: an object, or one as a string")
        return "json_schema", value if isinstance(value, str) else _dumped(value)
    if name == "choice":
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise wrong(".choice must be a list of strings")
        if not 0 < len(value) <= MAX_CHOICES:
            raise wrong(f".choice has {len(value)} entries; give 1 to {MAX_CHOICES}")
        return "choice", json.dumps(value, ensure_ascii=False)
    if name == "structural_tag" and isinstance(value, dict):
        return "structural_tag", _dumped(value)
    if not isinstance(value, str):
        raise wrong(f".{name} must be a string")
    return name, value


def _dumped(value: Any) -> str:
    if not is_within(value, max_nodes=MAX_VALUES, max_depth=MAX_SCHEMA_DEPTH):
        raise wrong(f"is too large; schemas may be {MAX_SCHEMA_DEPTH} levels deep, with {MAX_VALUES} values in all")
    return json.dumps(value, ensure_ascii=False)


def _grammar(kind: Any, source: str, param: str, is_compact: bool = False) -> Grammar:
    return Grammar(kind=kind, source=source, is_compact=is_compact, param=param)


_SCHEMA = {"type": "object"}
_TAG = {"triggers": {"type": "array", "items": {"type": "string"}}, "structures": {"type": "array"}}
ResponseFormat = Annotated[
    Grammar | None,
    PlainValidator(_response_format),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "type": {"enum": list(_FORMATS)},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                        "description": {"type": "string"},
                        "schema": _SCHEMA,
                        "strict": {"type": "boolean"},
                    },
                    "required": ["name", "schema"],
                },
                **_TAG,
            },
            "required": ["type"],
        }
    ),
]
StructuredOutputs = Annotated[
    Grammar | None,
    PlainValidator(_structured_outputs),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "json": {"anyOf": [_SCHEMA, {"type": "string"}]},
                "regex": {"type": "string"},
                "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_CHOICES},
                "grammar": {"type": "string"},
                "json_object": {"type": "boolean"},
                "structural_tag": {"anyOf": [{"type": "object", "properties": _TAG}, {"type": "string"}]},
                "disable_any_whitespace": {"type": "boolean"},
            },
        }
    ),
]
