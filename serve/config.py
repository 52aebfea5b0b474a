"""Outside input becomes options: a YAML file, checked as a whole before anything starts.

    models:
      - model: Qwen/Qwen3-0.6B
        max_model_len: 8192
      - model: tandem-text
    gateway:
      port: 8000

Keys are the field names of `serve/options.py`. A key that does not exist, a value of another type or out of bounds is
refused with the key's path, the value and what to do. Values are taken strictly: `"80"` is no number, `1` no
boolean.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from serve.errors import ConfigError
from serve.options import ServeOptions

T = TypeVar("T")

MAX_CONFIG_BYTES = 1 << 20

_EXPECTED = {
    "int_type": "a whole number, without quotes",
    "int_from_float": "a whole number",
    "float_type": "a number, without quotes",
    "bool_type": "true or false",
    "string_type": "a string; put it in quotes",
    "tuple_type": "a list",
    "dataclass_type": "a mapping of keys to values",
    "missing": "required; add it",
    "finite_number": "a finite number",
}


def load_config(path: str | Path) -> ServeOptions:
    """The application described by a YAML file. Raises ConfigError naming file, key, value and remedy."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"config file {str(path)!r} is over {MAX_CONFIG_BYTES} bytes; is it the right file?")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {_reason(error)}") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config file {str(path)!r} is not valid YAML: {error}") from None
    return parse_config(data, origin=str(path))


def parse_config(data: Any, *, origin: str = "config") -> ServeOptions:
    """The application described by plain data (YAML, or Ray Serve's `args`). Raises ConfigError."""
    if not isinstance(data, dict):
        raise ConfigError(f"{origin}: holds {type(data).__name__}, not a mapping; start it with 'models:'")
    try:
        # Through JSON, because strict mode takes a list for a tuple only there.
        return _ADAPTER.validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_describe(detail) for detail in error.errors())) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: {error}; use plain strings, numbers, lists and mappings") from None


def parse_value(cls: type[T], origin: str, text: str) -> T:
    """One option that has keys of its own, from JSON (a flag's value). Raises ConfigError."""
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        told = "; ".join(_describe(detail, cls) for detail in error.errors())
        raise ConfigError(f"{origin}: {told}", param=origin.lstrip("-").replace("-", "_")) from None


_ADAPTER = TypeAdapter(ServeOptions)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; a config file that has two is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool, type(None))):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice; remove one", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _describe(detail: Any, root: type = ServeOptions) -> str:
    """One pydantic error as `path: what is wrong with the value; what to do`."""
    path, kind, value = _path(detail["loc"]), detail["type"], detail["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(detail["loc"][:-1], root)
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
        return f"{path}: unknown key; {remedy}"
    if kind == "missing":
        return f"{path}: is required; add it"
    if kind == "value_error":
        problem = str(detail["ctx"]["error"])
        names_a_key = problem.split(" ", 1)[0] in _known_keys(detail["loc"], root)
        return problem if not path else f"{path}.{problem}" if names_a_key else f"{path}: {problem}"
    if kind == "literal_error":
        return f"{path}: {value!r} is not one of {detail['ctx']['expected']}"
    if kind == "json_invalid":
        return f'{_shown(value)} is not JSON ({detail["ctx"]["error"]}); write it as {{"key": value}}, in single quotes'
    told = f"{_shown(value)} is not {_EXPECTED.get(kind, detail['msg'])}"
    return f"{path}: {told}" if path else told


def _path(loc: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(loc: tuple[Any, ...], root: type) -> list[str]:
    """The keys that are possible at a path: follow it through the dataclasses."""
    cls: Any = root
    for part in loc:
        if isinstance(part, int):
            continue
        cls = _dataclass_in(typing.get_type_hints(cls)[part])
    return [spec.name for spec in dataclasses.fields(cls)]


def _dataclass_in(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return hint
    if isinstance(hint, types.UnionType) or typing.get_args(hint):
        return next(found for part in typing.get_args(hint) if (found := _dataclass_in(part)) is not None)
    return None


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
