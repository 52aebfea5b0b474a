"""Calls as bare JSON objects, in a row or in a list.

Llama 3      {"name": …, "parameters": {…}}; {"name": …, …}      from the start, or behind `<|python_tag|>`
required     [{"name": …, "arguments": {…}}, …]                  what a grammar makes a model without a format write
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from serve.gateway.parsing.call_object import CallObject
from serve.gateway.parsing.calls import Raw, Section
from serve.gateway.parsing.events import Parsed
from serve.gateway.parsing.json_scanner import SPACES


class JsonSection(Section):
    """Objects one after the other: with semicolons between them or nothing, or with brackets around and commas."""

    def __init__(self, names: Collection[str], *, is_list: bool) -> None:
        super().__init__()
        self._names = names
        self._is_list = is_list
        self._state: Callable[[str], bool] = self._open if is_list else self._object
        self._call: CallObject | None = None

    def _read(self, text: str, at: int, out: list[Parsed]) -> int:
        if self._call is None:
            if text[at] in SPACES:
                return at + 1
            self.is_settled = False
            return at + self._state(text[at])
        at = self._call.take(text, at, out)
        self.is_settled = self._call.has_begun
        self.is_broken = self._call.is_broken
        if self._call.is_raw:
            self._raw = Raw()
        elif self._call.is_done:
            self._call, self._state = None, self._between
        return at

    def _open(self, char: str) -> bool:
        self._state = self._first
        return char == "[" or self._break()

    def _first(self, char: str) -> bool:
        return self._close(char) or self._object(char)

    def _object(self, char: str) -> bool:
        if char == "{":
            self._call = CallObject(self._names)
            return False
        return self._break()

    def _between(self, char: str) -> bool:
        if char == ("," if self._is_list else ";"):
            self._state = self._object
            return True
        if self._is_list:
            return self._close(char) or self._break()
        if char == "{":
            return self._object(char)
        self.is_done = True
        return False

    def _close(self, char: str) -> bool:
        self.is_done = self.is_settled = char == "]"
        return self.is_done

    def _break(self) -> bool:
        self.is_broken = True
        return False
