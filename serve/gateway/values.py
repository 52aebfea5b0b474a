"""Types of the request fields: strict pydantic annotations with a bound on every number, list and string.

Strict means: no numbers as strings, no booleans as numbers, no NaN or infinity. What JSON Schema can say is left to
pydantic; prompts, messages and the like are checked by the small functions at the end, in linear time.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 128
MAX_LOGIT_BIAS = 1024
MAX_TEMPLATE_KWARGS = 32
MAX_IMAGES = 10
"""OpenAI's limit."""
MAX_PREVIEWS = 8
"""Of one image; OpenAI's limit is 3."""
TOKEN_ID_LIMIT = 1 << 31

RESERVED_TEMPLATE_NAMES = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "tokenize",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "raise_exception",
        "strftime_now",
    ]
)
"""Variables a request must not override in the chat template (vLLM's CVE-2025-61620 is this class of mistake)."""


def Int(least: int, most: int = TOKEN_ID_LIMIT - 1) -> Any:
    """A whole number in [least, most]."""
    return Annotated[int, Field(ge=least, le=most)]


def Num(least: float, most: float, *, above: bool = False) -> Any:
    """A finite number in [least, most], or in (least, most] with `above`."""
    bounds = Field(gt=least, le=most) if above else Field(ge=least, le=most)
    return Annotated[float, bounds]


def Text(most: int, *, least: int = 0) -> Any:
    """A string of so many characters."""
    return Annotated[str, StringConstraints(min_length=least, max_length=most)]


_TokenId = Annotated[int, Field(ge=0, lt=TOKEN_ID_LIMIT)]


def TokenIds(most: int) -> Any:
    """A list of up to `most` token ids; the vocabulary is checked later, against the model."""
    return Annotated[list[_TokenId], Field(max_length=most)]


def wrong(message: str) -> PydanticCustomError:
    """A validation error whose text is ours; it must not quote strings of the request."""
    return PydanticCustomError("refused", message.replace("{", "(").replace("}", ")"))


Name = Text(512, least=1)
RequestId = Annotated[str, StringConstraints(pattern=re.compile(r"^[A-Za-z0-9._:-]{1,128}\Z"))]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Side = Literal["left", "right"]
ImageFormat = Literal["png", "jpeg", "webp"]
Moderation = Literal["low", "auto"]
_Key = Annotated[str, StringConstraints(max_length=64)]
_Note = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[_Key, _Note], Field(max_length=16)]
Opaque = Annotated[dict[str, Any], Field(max_length=64)]


class StreamOptions(BaseModel):
    """`stream_options` of OpenAI plus vLLM's running usage."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Without effect: padding against traffic analysis is not added."""


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise wrong(f"has {len(stops)} entries; at most {MAX_STOPS} are allowed")
    if any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise wrong(f"every stop string needs 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(stops))


Stop = Annotated[
    tuple[str, ...] | None,
    PlainValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "maxItems": MAX_STOPS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                },
                {"type": "null"},
            ]
        }
    ),
]


def _early_stopping(value: Any) -> bool | str:
    if not isinstance(value, bool) and value != "never":
        raise wrong('must be true, false or "never"')
    return value


EarlyStopping = Annotated[
    bool | Literal["never"],
    PlainValidator(_early_stopping),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"const": "never"}]}),
]


def _prompt(value: Any) -> list[str] | list[list[int]]:
    """Prompts of one kind: texts, or lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [_token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise wrong(f"has {len(value)} prompts; at most {MAX_PROMPTS} are allowed in one request")
    if kinds == {str}:
        return value
    if kinds == {list}:
        return [_token_ids(ids) for ids in value]
    raise wrong("must hold strings only, token ids only, or lists of token ids only")


def _token_ids(ids: list[Any]) -> list[int]:
    if not ids:
        raise wrong("a prompt of token ids is empty; give at least one")
    if set(map(type, ids)) != {int}:
        raise wrong("a list of token ids must hold whole numbers only")
    if min(ids) < 0 or max(ids) >= TOKEN_ID_LIMIT:
        raise wrong("a token id is outside the vocabulary")
    return ids


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                _IDS_SCHEMA,
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise wrong("must be an object of token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise wrong(f"has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    pairs: dict[int, float] = {}
    for key, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise wrong("keys must be token ids in decimal digits")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise wrong("values must be numbers from -100 to 100")
        if int(key) in pairs:
            raise wrong("names a token id twice")
        pairs[int(key)] = float(bias)
    return tuple(pairs.items())


LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
]


def _template_kwargs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_KWARGS:
        raise wrong(f"must be an object with at most {MAX_TEMPLATE_KWARGS} entries")
    for name, item in value.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) or name in RESERVED_TEMPLATE_NAMES:
            raise wrong("holds a name a request may not set; use the template's own variables such as enable_thinking")
        plain = isinstance(item, bool) or item is None or (isinstance(item, str) and len(item) <= 4096)
        if not plain and (type(item) not in (int, float) or not math.isfinite(item) or abs(item) > 1e18):
            raise wrong("values must be strings of at most 4096 characters, finite numbers, booleans or null")
    return value


TemplateKwargs = Annotated[
    dict[str, Any],
    PlainValidator(_template_kwargs),
    WithJsonSchema({"type": "object", "maxProperties": MAX_TEMPLATE_KWARGS}),
]


def _size(value: Any) -> tuple[int, int] | None:
    """Width and height; None leaves them to the model."""
    if value == "auto":
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value) if isinstance(value, str) else None
    if match is None:
        raise wrong("must be auto or WIDTHxHEIGHT in pixels, such as 64x64")
    return int(match[1]), int(match[2])


Size = Annotated[
    tuple[int, int] | None,
    PlainValidator(_size),
    WithJsonSchema({"type": "string", "pattern": "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"}),
]


def _image_response(value: Any) -> str:
    """A `data:` URL would be no answer either: who asks for a URL fetches it, and HTTP clients cannot fetch those."""
    if value != "b64_json":
        raise wrong("must be b64_json: images are not kept here, so there is no URL; decode data[i].b64_json")
    return "b64_json"


ImageResponse = Annotated[str, PlainValidator(_image_response), WithJsonSchema({"const": "b64_json"})]
