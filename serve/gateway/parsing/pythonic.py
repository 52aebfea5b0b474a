"""Llama 3.2 and 4: calls as Python writes them, `[f(city="Paris", days=3), g()]`, at the start of the answer.

Llama 4 may write `<|python_start|>` and `<|python_end|>` around the list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from serve.gateway.parsing.calls import Raw, Section
from serve.gateway.parsing.events import Arguments, CallEnd, CallStart, Parsed
from serve.gateway.parsing.json_scanner import SPACES
from serve.gateway.parsing.python_literal import PythonLiteral

START, END = "<|python_start|>", "<|python_end|>"
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_MAX_NAME_CHARS = 256


class PythonicSection(Section):
    """The list, from its bracket on."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._state: Callable[[str, list[Parsed]], bool] = self._open
        self._word = ""
        """The name being read: a function's or an argument's."""
        self._name = ""
        self._has_begun = False
        """The current call has been told."""
        self._keys: set[str] = set()
        self._value: PythonLiteral | None = None

    def _read(self, text: str, at: int, out: list[Parsed]) -> int:
        while at < len(text) and not (self.is_done or self.is_broken):
            if self._value is not None:
                at = self._in_value(self._value, text, at, out)
            elif (text[at] in SPACES and not self._word) or self._state(text[at], out):
                at += 1
            else:
                self._break(out)
            if self._raw is not None or self.is_settled:
                break
        return at

    def _in_value(self, value: PythonLiteral, text: str, at: int, out: list[Parsed]) -> int:
        parts: list[str] = []
        at = value.take(text, at, parts)
        out.append(Arguments("".join(parts)))
        if value.is_broken:
            self._break(out)
        elif value.is_done:
            self._value, self._state = None, self._after_value
        return at

    def _open(self, char: str, out: list[Parsed]) -> bool:
        self._state = self._first
        return char == "["

    def _first(self, char: str, out: list[Parsed]) -> bool:
        self._state = self._function
        return self._function(char, out)

    def _function(self, char: str, out: list[Parsed]) -> bool:
        """In a function's name."""
        if char == "(":
            self._name, self._word = self._word, ""
            self._keys.clear()
            self._state = self._first_argument
            return self._name in self._names
        return self._more(char)

    def _first_argument(self, char: str, out: list[Parsed]) -> bool:
        return self._close_call(char, out) or self._argument(char, out)

    def _argument(self, char: str, out: list[Parsed]) -> bool:
        """In an argument's name."""
        self._state = self._argument
        if char in SPACES:
            self._state = self._equals
            return True
        if char == "=":
            return self._equals(char, out)
        return self._more(char)

    def _equals(self, char: str, out: list[Parsed]) -> bool:
        key = self._word
        if char != "=" or not key or key in self._keys:
            return char in SPACES
        self._word = ""
        self._begin(out)
        out.append(Arguments((", " if self._keys else "") + json.dumps(key) + ": "))
        self._keys.add(key)
        self._value = PythonLiteral()
        return True

    def _after_value(self, char: str, out: list[Parsed]) -> bool:
        if char == ",":
            self._state = self._first_argument
            return True
        return self._close_call(char, out)

    def _close_call(self, char: str, out: list[Parsed]) -> bool:
        if char != ")" or self._word:
            return False
        self._begin(out)
        out += (Arguments("}"), CallEnd())
        self._has_begun = False
        self._state = self._after_call
        return True

    def _after_call(self, char: str, out: list[Parsed]) -> bool:
        self.is_settled = False
        if char == ",":
            self._state = self._function_or_end
            return True
        return self._close_list(char)

    def _function_or_end(self, char: str, out: list[Parsed]) -> bool:
        return self._close_list(char) or self._first(char, out)

    def _close_list(self, char: str) -> bool:
        self.is_done = self.is_settled = char == "]"
        return self.is_done

    def _begin(self, out: list[Parsed]) -> None:
        if not self._has_begun:
            self._has_begun = self.is_settled = True
            out += (CallStart(self._name), Arguments("{"))

    def _more(self, char: str) -> bool:
        self._word += char
        return char in _NAME_CHARS and len(self._word) <= _MAX_NAME_CHARS

    def _break(self, out: list[Parsed]) -> None:
        if self._has_begun:
            self._raw = Raw()
            out.append(Arguments(", " + self._word if self._word else ""))
        else:
            self.is_broken = True
