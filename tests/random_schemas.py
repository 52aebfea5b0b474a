"""Random JSON Schemas of the kinds people send, small enough for a small model to fill in."""

from __future__ import annotations

import json
import random
from typing import Any

NAMES = ["name", "age", "id", "kind", "tags", "note", "items", "x", "y", "size", "left", "right", "größe", "is_ok"]
WORDS = ["red", "green", "blue", "none", "a b", 'say "hi"', "ü", "1"]


def random_schema(seed: int) -> dict[str, Any]:
    """Closed objects mostly; every output is short enough to be finished within some hundred tokens."""
    choose = random.Random(seed)
    root = _object(choose, 2) if choose.random() < 0.8 else _schema(choose, 2)
    if choose.random() < 0.1:
        root = {"$ref": "#/$defs/root", "$defs": {"root": root}}
    return json.loads(json.dumps(root))


def _schema(choose: random.Random, depth: int) -> dict[str, Any]:
    makers = [_string, _number, _integer, _enum, _boolean]
    if depth > 0:
        makers += [_object, _array, _any_of]
    return choose.choice(makers)(choose, depth - 1)


def _string(choose: random.Random, depth: int) -> dict[str, Any]:
    shape = choose.randrange(4)
    if shape == 0:
        least = choose.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + choose.randrange(6)}
    if shape == 1:
        return {"type": "string", "pattern": choose.choice(["^[0-9]{5}$", "^(a|b)+c?$", "^[A-Z][a-z]{0,4}$"]), **_short}
    if shape == 2:
        return {"type": "string", "format": choose.choice(["date", "ipv4", "uuid"])}
    return {"type": "string", "maxLength": 8, "description": "a short text"}


_short = {"maxLength": 8}


def _integer(choose: random.Random, depth: int) -> dict[str, Any]:
    least = choose.randrange(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + choose.randrange(100)}


def _number(choose: random.Random, depth: int) -> dict[str, Any]:
    least = choose.randrange(-50, 50) / 4
    return {
        "type": "number",
        "minimum": least,
        "exclusiveMaximum": least + 1 + choose.randrange(20),
        "multipleOf": 0.25,
    }


def _enum(choose: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = choose.sample([*WORDS, 1, None, True, 2.5], choose.randint(1, 4))
    return {"const": values[0]} if choose.random() < 0.3 else {"enum": values}


def _boolean(choose: random.Random, depth: int) -> dict[str, Any]:
    return {"type": choose.choice(["boolean", "null"])}


def _array(choose: random.Random, depth: int) -> dict[str, Any]:
    if choose.random() < 0.2:
        return {"type": "array", "prefixItems": [_schema(choose, 0), _schema(choose, 0)], "items": False, "minItems": 2}
    least = choose.randrange(2)
    items = _schema(choose, depth)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + choose.randrange(3)}


def _any_of(choose: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(choose, depth) for _ in range(choose.randint(1, 3))]}


def _object(choose: random.Random, depth: int) -> dict[str, Any]:
    names = choose.sample(NAMES, choose.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _schema(choose, depth) for name in names}}
    schema["required"] = [name for name in names if choose.random() < 0.7]
    schema["additionalProperties"] = False
    return schema
