"""One tool call written as a JSON object: `{"name": "f", "arguments": {…}}`, as it is generated.

Keys may come in any order; "parameters" is Llama's word for "arguments"; other keys ("id", "type") say nothing here.
Nothing is told before the name is known to be a tool and the arguments have begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from serve.gateway.parsing.events import Arguments, CallEnd, CallStart, Parsed
from serve.gateway.parsing.json_scanner import SPACES, JsonScanner

_ARGUMENTS = ("arguments", "parameters")


class CallObject:
    """Reads one object, from before its `{` on."""

    def __init__(self, names: Collection[str]) -> None:
        self.is_done = False
        self.is_broken = False
        """It was no call. Nothing has been told."""
        self.is_raw = False
        """It is a call, but its arguments stopped being JSON. What follows is theirs as it was written."""
        self.has_begun = False
        """It is a call."""
        self._names = names
        self._name: str | None = None
        self._state: Callable[[str], bool] = self._open
        self._key = ""
        self._scanner: JsonScanner | None = None
        self._scanned: list[str] = []
        self._early: list[str] | None = None
        """Arguments that came before the name; later they are told at once."""
        self._has_arguments = False

    def take(self, text: str, at: int, out: list[Parsed]) -> int:
        """Read from `at` to the object's end at most, appending what it says. Returns where it stopped."""
        while at < len(text) and not (self.is_done or self.is_broken or self.is_raw):
            if self._scanner is not None:
                at = self._scan(self._scanner, text, at, out)
            elif text[at] in SPACES or self._state(text[at]):
                at += 1
            elif self._scanner is None:
                self._break(out)
            if self._state == self._closed:
                self._complete(out)
        return at

    def _open(self, char: str) -> bool:
        self._state = self._first_key
        return char == "{"

    def _first_key(self, char: str) -> bool:
        return self._key_start(char) or self._close(char)

    def _key_start(self, char: str) -> bool:
        if char == '"':
            self._key = ""
            self._begin_scan(self._colon)
        return False

    def _colon(self, char: str) -> bool:
        self._state = self._value_start
        return char == ":"

    def _value_start(self, char: str) -> bool:
        is_fit = char == '"' if self._key == "name" else char == "{" if self._is_arguments else True
        if is_fit:
            if self._is_arguments:
                self._early = []
            self._begin_scan(self._after)
        return False

    def _after(self, char: str) -> bool:
        if char == ",":
            self._state = self._key_start
            return True
        return self._close(char)

    def _close(self, char: str) -> bool:
        if char == "}":
            self._state = self._closed
        return char == "}"

    def _closed(self, char: str) -> bool:
        return False

    @property
    def _is_arguments(self) -> bool:
        return self._key in _ARGUMENTS and not self._has_arguments

    def _begin_scan(self, then: Callable[[str], bool]) -> None:
        self._scanner, self._scanned, self._state = JsonScanner(), [], then

    def _scan(self, scanner: JsonScanner, text: str, at: int, out: list[Parsed]) -> int:
        """On with a key or a value."""
        parts: list[str] = []
        at = scanner.take(text, at, parts)
        in_arguments = self._key != "" and self._is_arguments
        if in_arguments:
            self._tell_arguments(parts, out)
        elif self._key in ("", "name"):
            self._scanned += parts
        if scanner.is_broken:
            self._break(out)
        elif scanner.is_done:
            self._scanner = None
            if in_arguments:
                self._has_arguments = True
            elif self._key == "":
                self._key = json.loads("".join(self._scanned)) or " "
            elif self._key == "name" and self._name is None:
                self._named(json.loads("".join(self._scanned)), out)
        return at

    def _named(self, name: str, out: list[Parsed]) -> None:
        if name not in self._names:
            self._break(out)
            return
        self._name = name
        if self._early is not None:
            self._tell_arguments([], out)

    def _tell_arguments(self, parts: list[str], out: list[Parsed]) -> None:
        early = self._early if self._early is not None else []
        early += parts
        if self._name is None or self.is_broken:
            return
        if not self.has_begun:
            self.has_begun = True
            out.append(CallStart(self._name))
        if text := "".join(early):
            out.append(Arguments(text))
        early.clear()

    def _complete(self, out: list[Parsed]) -> None:
        """The object has ended, or broke behind complete arguments."""
        if self._name is None:
            self.is_broken = True
            return
        if not self._has_arguments:
            self._tell_arguments(["{}"], out)
        out.append(CallEnd())
        self.is_done = True

    def _break(self, out: list[Parsed]) -> None:
        if not self.has_begun:
            self.is_broken = True
        elif self._has_arguments:
            self._complete(out)
        else:
            self.is_raw = True
