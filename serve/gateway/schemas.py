"""From the bytes of a body to a checked request: strict JSON, then the tables of `fields.py`, then pydantic.

Error texts name the field and say what to do. They show numbers but never strings of the request: prompt text, perhaps.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from serve.errors import InvalidRequest
from serve.gateway import values as v
from serve.gateway.field import CHAT, COMPLETIONS, IMAGES, PATHS, Use
from serve.gateway.fields import FIELDS
from serve.gateway.messages import Message, Messages
from serve.gateway.tools import Tools

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_REQUIRED = {CHAT: "messages", COMPLETIONS: "prompt", IMAGES: "prompt"}
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _model(name: str, endpoint: str) -> type[BaseModel]:
    """The pydantic model of an endpoint's honoured and accepted fields."""
    known = [entry for entry in FIELDS[endpoint].values() if entry.use is not Use.REFUSED]
    definitions: dict[str, Any] = {
        entry.name: (
            entry.type,
            Field(
                default=... if entry.name == _REQUIRED[endpoint] else None,
                description=entry.note,
                examples=[entry.example],
            ),
        )
        for entry in known
    }
    return create_model(name, __config__=_STRICT, **definitions)


ChatCompletionRequest = _model("ChatCompletionRequest", CHAT)
CompletionRequest = _model("CompletionRequest", COMPLETIONS)
ImageGenerationRequest = _model("ImageGenerationRequest", IMAGES)


class TokenizeRequest(BaseModel):
    """vLLM's `/tokenize`: a prompt, or messages."""

    model_config = _STRICT
    model: v.Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    """With messages only."""
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: v.TemplateKwargs | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """vLLM's `/detokenize`."""

    model_config = _STRICT
    model: v.Name | None = None
    tokens: v.TokenIds(1 << 20)  # type: ignore[valid-type]


def parse_chat(body: bytes) -> Any:
    """A ChatCompletionRequest. Raises InvalidRequest."""
    return _validate(ChatCompletionRequest, _from_table(parse_object(body), CHAT))


def parse_completion(body: bytes) -> Any:
    """A CompletionRequest. Raises InvalidRequest."""
    return _validate(CompletionRequest, _from_table(parse_object(body), COMPLETIONS))


def parse_image(body: bytes) -> Any:
    """An ImageGenerationRequest. Raises InvalidRequest."""
    return _validate(ImageGenerationRequest, _from_table(parse_object(body), IMAGES))


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises InvalidRequest."""
    request: TokenizeRequest = _validate(TokenizeRequest, parse_object(body))
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if request.tools and request.messages is None:
        raise InvalidRequest("tools belong to messages; leave them out with a prompt", param="tools")
    return request


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises InvalidRequest."""
    request: DetokenizeRequest = _validate(DetokenizeRequest, parse_object(body))
    return request


def parse_object(body: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no key twice, no NaN, no lone surrogates, bounded depth and digits."""
    try:
        text = body.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        if _ESCAPED_SURROGATE.search(body):
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise InvalidRequest("the body is not valid UTF-8 text") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg.lower()} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError as error:  # digits beyond Python's limit say so in a text of their own
        known = error.args[0] if error.args and isinstance(error, _JsonRefused) else "a number has too many digits"
        raise InvalidRequest(f"the body is not valid JSON: {known}") from None
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be one JSON object")
    return data


class _JsonRefused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _JsonRefused("an object has the same key twice")
    return found


def _no_constant(name: str) -> Any:
    raise _JsonRefused(f"{name} is not a JSON number")


def _from_table(data: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """`data` without refused fields that ask for nothing. Raises InvalidRequest for the others, and unknown ones."""
    table = FIELDS[endpoint]
    kept = {}
    for name, value in data.items():
        entry = table.get(name)
        if entry is None:
            elsewhere = next((other for other in FIELDS if name in FIELDS[other]), None)
            hint = f"{name} belongs to {PATHS[elsewhere]}" if elsewhere else _unknown(name, list(table))
            raise InvalidRequest(hint, param=_safe_name(name))
        if entry.use is not Use.REFUSED:
            kept[name] = value
        elif value is not None and not any(_same(value, harmless) for harmless in entry.harmless):
            raise InvalidRequest(f"{name} is not supported: {entry.note}", param=name)
    return kept


def _same(value: Any, harmless: Any) -> bool:
    """Equal as JSON values: true is not 1."""
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:64], known, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else "see /docs for the fields of this endpoint"
    shown = _safe_name(name)
    return f"unknown field {shown!r}; {remedy}" if shown else f"unknown field; {remedy}"


def _safe_name(name: str) -> str | None:
    """A field's name fit for a message: identifiers only."""
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", name) else None


def _validate(model: type[BaseModel], data: dict[str, Any]) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=True)[0]
        param, message = _describe(detail, model)
        raise InvalidRequest(message, param=param) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


_EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_unicode": "must be a string of valid Unicode",
    "string_pattern_mismatch": "may hold letters, digits and . _ : - only, at most 128",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
}


def _describe(detail: Any, model: type[BaseModel]) -> tuple[str | None, str]:
    """(field, message) of a pydantic error, without the request's own strings."""
    loc, kind, value, context = detail["loc"], detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        name = str(loc[-1])
        where = _path(loc[:-1])
        known = list(Message.model_fields) if where.startswith("messages") else list(model.model_fields)
        return _safe_name(name) and _path(loc), f"{where + ': ' if where else ''}{_unknown(name, known)}"
    path = _path(loc)
    shown = f"{path} is {value!r}: " if type(value) in (int, float) and abs(value) < 1e20 else f"{path} "
    if kind == "missing":
        return path, f"{path} is required"
    if kind == "refused":
        return path, f"{path} {detail['msg']}"
    if kind == "literal_error":
        return path, f"{path} must be one of {context['expected']}"
    limits = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "above"}
    if kind in limits:
        bound = next(context[key] for key in ("ge", "le", "gt") if key in context)
        return path, f"{shown}must be {limits[kind]} {bound:g}" if abs(bound) < 1e6 else f"{shown}is out of range"
    if kind in ("too_long", "string_too_long"):
        unit = "characters" if kind == "string_too_long" else "entries"
        return path, f"{path} is too long; at most {context['max_length']} {unit} are allowed"
    if kind in ("too_short", "string_too_short"):
        return path, f"{path} must not be empty"
    return path, f"{path} {_EXPECTED.get(kind, 'has a value that is not allowed')}"


def _path(loc: tuple[Any, ...]) -> str:
    """`messages[0].content`, without pydantic's own names for union branches and without keys of the request."""
    parts = []
    for part in loc:
        if isinstance(part, int):
            parts.append(f"[{part}]")
        elif re.fullmatch(r"[a-z_]{1,64}", part):
            parts.append(f".{part}")
    return "".join(parts).lstrip(".")
