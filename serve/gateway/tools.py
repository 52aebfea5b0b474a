"""The tools of a chat request and the choice among them: strict types. What a call looks like is the model's affair.

A tool is kept as it was sent, for the chat template sees it so: the order of its keys is part of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, StringConstraints, WithJsonSchema

from serve.gateway.json_limits import MAX_DEPTH, is_within
from serve.gateway.values import wrong

MAX_TOOLS = 128
"""OpenAI's limit."""
MAX_DESCRIPTION_CHARS = 16384
MAX_SCHEMA_VALUES = 20_000
"""Of all tools of a request together."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    definition: dict[str, Any]
    """What the chat template sees: as it was sent, without `strict`, which is for the server."""
    parameters: dict[str, Any]
    """JSON Schema of its arguments."""
    is_strict: bool


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """ "none", "auto" or "required"; or with `name` the one tool that must be called."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


def _tools(value: Any) -> tuple[Tool, ...]:
    if not isinstance(value, list):
        raise wrong("must be a list")
    if len(value) > MAX_TOOLS:
        raise wrong(f"has {len(value)} entries; at most {MAX_TOOLS} are allowed")
    if not is_within(value, max_nodes=MAX_SCHEMA_VALUES, max_depth=MAX_DEPTH + 4):
        raise wrong(
            f"is too large; schemas may be {MAX_DEPTH} levels deep, with {MAX_SCHEMA_VALUES} values in all tools"
        )
    tools = tuple(_tool(entry, index) for index, entry in enumerate(value))
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise wrong(f"entry {index} has the name of entry {names.index(name)}; names must be unique")
    return tools


def _tool(value: Any, index: int) -> Tool:
    def need(condition: bool, problem: str) -> None:
        if not condition:
            raise wrong(f"entry {index}{problem}")

    need(isinstance(value, dict), " must be an object")
    need(value.get("type") == "function", '.type must be "function"')
    function = value.get("function")
    need(isinstance(function, dict), ".function must be an object")
    _need_known(value, {"type", "function"}, need, "")
    _need_known(function, {"name", "description", "parameters", "strict"}, need, ".function")
    name = function.get("name")
    need(
        isinstance(name, str) and _NAME.fullmatch(name) is not None,
        ".function.name must be 1 to 64 letters, digits, _ or -",
    )
    description = function.get("description")
    need(
        description is None or (isinstance(description, str) and len(description) <= MAX_DESCRIPTION_CHARS),
        f".function.description must be a string of at most {MAX_DESCRIPTION_CHARS} characters",
    )
    is_strict = function.get("strict")
    need(is_strict is None or isinstance(is_strict, bool), ".function.strict must be true or false")
    parameters = function.get("parameters")
    _check_schema({} if parameters is None else parameters, need)
    definition = {**value, "function": {key: item for key, item in function.items() if key != "strict"}}
    return Tool(name, definition, _NO_ARGUMENTS if parameters is None else parameters, bool(is_strict))


def _need_known(value: dict[str, Any], known: set[str], need: Callable[[bool, str], None], where: str) -> None:
    need(not value.keys() - known, f"{where} holds a field that is not known; known are {', '.join(sorted(known))}")


def _check_schema(schema: Any, need: Callable[[bool, str], None]) -> None:
    """What every schema of arguments has to be. The rest is checked where it is compiled."""
    where = ".function.parameters"
    need(isinstance(schema, dict), f"{where} must be a JSON Schema, an object")
    need(schema.get("type", "object") == "object", f'{where}.type must be "object": arguments are named')
    properties = schema.get("properties", {})
    need(isinstance(properties, dict), f"{where}.properties must be an object")
    need(
        all(isinstance(entry, (dict, bool)) for entry in properties.values()),
        f"{where}.properties must hold a JSON Schema for each name",
    )
    required = schema.get("required", [])
    need(
        isinstance(required, list) and all(isinstance(entry, str) for entry in required),
        f"{where}.required must be a list of names",
    )


Tools = Annotated[
    tuple[Tool, ...],
    PlainValidator(_tools),
    WithJsonSchema(
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "required": ["type", "function"],
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "required": ["name"],
                        "properties": {
                            "name": {"type": "string", "pattern": _NAME.pattern},
                            "description": {"type": "string", "maxLength": MAX_DESCRIPTION_CHARS},
                            "parameters": {"type": "object"},
                            "strict": {"type": "boolean"},
                        },
                    },
                },
            },
        }
    ),
]


def _choice(value: Any) -> ToolChoice:
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    function = value.get("function") if isinstance(value, dict) else None
    if (
        not isinstance(function, dict)
        or value.keys() != {"type", "function"}
        or value["type"] != "function"
        or function.keys() != {"name"}
        or not isinstance(function["name"], str)
    ):
        raise wrong('must be none, auto, required or (type: "function", function: (name: a tool\'s name))')
    return ToolChoice("required", function["name"])


Choice = Annotated[
    ToolChoice,
    PlainValidator(_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "required": ["type", "function"],
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": {"type": "string"}},
                        },
                    },
                },
            ]
        }
    ),
]
