"""The messages of a conversation: strict pydantic types, and what the chat template sees of them.

Tools answer calls: a `tool` message follows the assistant's message whose call it names, and answers it once.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from serve.gateway.json_limits import MAX_DEPTH, is_within
from serve.gateway.tools import MAX_TOOLS, ToolName
from serve.gateway.values import wrong

MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_ARGUMENT_VALUES = 20_000
"""In the arguments of one call."""
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _content(value: Any) -> Any:
    """A message's text: a string, or text parts joined by line ends (as vLLM does for templates that take strings)."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_PARTS:
        raise wrong(f"has {len(value)} parts; at most {MAX_PARTS} are allowed")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise wrong("parts must be objects with a type")
        if part["type"] not in ("text", "refusal"):
            raise wrong("holds a part that is not text; only text goes in and out")
        if part.keys() - {"type", part["type"], "prompt_cache_breakpoint"}:
            raise wrong("a text part holds type and text only")
        if not isinstance(part.get(part["type"]), str):
            raise wrong("a text part needs a string as its text")
        texts.append(part[part["type"]])
    return "\n".join(texts)


def _nothing(value: Any) -> None:
    if value not in (None, [], {}):
        raise wrong("is not supported; leave it out or empty")


_Nothing = Annotated[None, PlainValidator(_nothing), WithJsonSchema({"type": "null"})]
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "maxItems": MAX_PARTS,
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}


def _arguments(value: Any) -> Any:
    """The arguments of a call in the conversation: JSON text, as models write it and OpenAI sends it. As an object."""
    if not isinstance(value, str):
        raise wrong("must be a string that holds a JSON object")
    try:
        arguments = json.loads(value or "{}", parse_constant=_no_constant)
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise wrong("must hold a JSON object; of a call that was cut off, repair them or leave the call out") from None
    if not isinstance(arguments, dict):
        raise wrong("must hold a JSON object")
    if not is_within(arguments, max_nodes=MAX_ARGUMENT_VALUES):
        raise wrong(f"are too large; at most {MAX_DEPTH} levels and {MAX_ARGUMENT_VALUES} values are allowed")
    return arguments


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


class CalledFunction(BaseModel):
    """The function of a call, and what it was called with."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: ToolName
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments), WithJsonSchema({"type": "string"})]
    parsed_arguments: Any = None
    """OpenAI's client adds it to what it parses and sends it back; without effect."""


class ToolCall(BaseModel):
    """A call the assistant made."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """In streamed calls, so clients that add chunks up send it back; without effect."""

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """Older name of `reasoning`. Templates of reasoning models read either."""
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = None
    """In a tool's message: the call it answers."""
    function_call: _Nothing = None
    audio: _Nothing = None
    annotations: Annotated[list[Any], Field(max_length=256)] | None = None
    """In OpenAI's answers, so clients send it back; without effect."""
    parsed: Any = None
    """Likewise, of OpenAI's client."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise wrong("needs content")
        if self.tool_calls and self.role != "assistant":
            raise wrong("holds tool_calls; only an assistant's message may")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise wrong("a message of role tool needs tool_call_id, and no other may have it")
        ids = [call.id for call in self.tool_calls or ()]
        if len(set(ids)) < len(ids):
            raise wrong("holds tool_calls of the same id; ids must be unique")
        return self

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees, as transformers' documentation has it: arguments are an object. Content that is
        null beside calls is left out, as transformers does. `developer` is OpenAI's newer name for `system`."""
        shown: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if self.content is not None or not self.tool_calls:
            shown["content"] = self.content or ""
        reasoning = self.reasoning if self.reasoning is not None else self.reasoning_content
        if reasoning is not None:
            shown["reasoning_content"] = reasoning
        if self.name is not None:
            shown["name"] = self.name
        if self.tool_calls:
            shown["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            shown["tool_call_id"] = self.tool_call_id
        return shown

    @property
    def num_chars(self) -> int:
        """About how long it is, for a guess at the time it takes to encode."""
        called = sum(len(str(call.function.arguments)) for call in self.tool_calls or ())
        return len(self.content or "") + len(self.reasoning or self.reasoning_content or "") + called


def _answer_calls(messages: list[Message]) -> list[Message]:
    """Tools answer the calls of the assistant's message before them, each once. An answer gets its function's name:
    some templates (Hermes) ask for it, and OpenAI's clients do not send it."""
    pending: dict[str, str] = {}
    for index, message in enumerate(messages):
        if message.tool_call_id is None:
            pending = {call.id: call.function.name for call in message.tool_calls or ()}
        elif message.tool_call_id not in pending:
            raise wrong(
                f"entry {index}.tool_call_id names no unanswered call of the assistant's message before it; send that "
                "message with its tool_calls, and one answer to each"
            )
        else:
            name = pending.pop(message.tool_call_id)
            message.name = message.name or name
    return messages


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_answer_calls)]
