"""Finds the end of a JSON value in text that comes in pieces: one look at each character, bounded depth.

Control characters inside strings, which models write and JSON forbids, are passed on escaped; anything else that is not
JSON breaks the scan at that character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

MAX_DEPTH = 64
"""Of lists and objects inside each other. Python's own parser reads about a thousand; callers' tools need a few."""
SPACES = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_CLOSER = {"{": "}", "[": "]"}
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_NUMBERS: dict[str, dict[str, str]] = {
    # state: {character: next state}
    "minus": {**dict.fromkeys("123456789", "whole"), "0": "zero"},
    "zero": {".": "point", "e": "e", "E": "e"},
    "whole": {**dict.fromkeys("0123456789", "whole"), ".": "point", "e": "e", "E": "e"},
    "point": dict.fromkeys("0123456789", "fraction"),
    "fraction": {**dict.fromkeys("0123456789", "fraction"), "e": "e", "E": "e"},
    "e": {**dict.fromkeys("0123456789", "exponent"), "+": "sign", "-": "sign"},
    "sign": dict.fromkeys("0123456789", "exponent"),
    "exponent": dict.fromkeys("0123456789", "exponent"),
}
_NUMBER_ENDS = frozenset(["zero", "whole", "fraction", "exponent"])
_NUMBER_STARTS = {"-": "minus", "0": "zero", **dict.fromkeys("123456789", "whole")}


class JsonScanner:
    """One value, from its first character on."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._state: Callable[[str], bool] = self._value
        self._stack: list[str] = []
        """The closing brackets to come."""
        self._is_key = False
        self._rest = ""
        """Of a literal."""
        self._number = ""
        self._num_hex = 0

    def take(self, text: str, at: int, out: list[str]) -> int:
        """Read from `at` to the value's end at most; append to `out` what was read. Returns where it stopped reading:
        the character there is not part of the value (done) or cannot be (broken)."""
        start = at
        while at < len(text) and not self.is_done and not self.is_broken:
            if self._state == self._string:
                plain = _PLAIN.match(text, at)
                at = plain.end() if plain else at
                if at == len(text):
                    break
                if text[at] < " ":
                    out += (text[start:at], json.dumps(text[at])[1:-1])
                    at = start = at + 1
                    continue
            if self._state(text[at]):
                at += 1
        out.append(text[start:at])
        return at

    def _value(self, char: str) -> bool:
        if char in SPACES:
            return True
        if char == '"':
            self._is_key, self._state = False, self._string
        elif char in _CLOSER:
            return self._open(char)
        elif char in _LITERALS:
            self._rest, self._state = _LITERALS[char][1:], self._literal
        elif char in _NUMBER_STARTS:
            self._number, self._state = _NUMBER_STARTS[char], self._in_number
        else:
            return self._break()
        return True

    def _open(self, char: str) -> bool:
        if len(self._stack) == MAX_DEPTH:
            return self._break()
        self._stack.append(_CLOSER[char])
        self._state = self._first_key if char == "{" else self._first_item
        return True

    def _first_item(self, char: str) -> bool:
        return self._close() if char == "]" else self._value(char)

    def _first_key(self, char: str) -> bool:
        return self._close() if char == "}" else self._key(char)

    def _key(self, char: str) -> bool:
        if char == '"':
            self._is_key, self._state = True, self._string
            return True
        return char in SPACES or self._break()

    def _colon(self, char: str) -> bool:
        if char == ":":
            self._state = self._value
            return True
        return char in SPACES or self._break()

    def _after(self, char: str) -> bool:
        if char == ",":
            self._state = self._key if self._stack[-1] == "}" else self._value
            return True
        if char == self._stack[-1]:
            return self._close()
        return char in SPACES or self._break()

    def _string(self, char: str) -> bool:
        """At a quote or a backslash: `take` has passed over the rest."""
        if char == "\\":
            self._state = self._escape
        elif self._is_key:
            self._state = self._colon
        else:
            self._end()
        return True

    def _escape(self, char: str) -> bool:
        if char == "u":
            self._num_hex, self._state = 4, self._hex
        elif char in '"\\/bfnrt':
            self._state = self._string
        else:
            return self._break()
        return True

    def _hex(self, char: str) -> bool:
        if char not in "0123456789abcdefABCDEF":
            return self._break()
        self._num_hex -= 1
        if not self._num_hex:
            self._state = self._string
        return True

    def _literal(self, char: str) -> bool:
        if char != self._rest[0]:
            return self._break()
        self._rest = self._rest[1:]
        if not self._rest:
            self._end()
        return True

    def _in_number(self, char: str) -> bool:
        following = _NUMBERS[self._number].get(char)
        if following is not None:
            self._number = following
            return True
        if self._number not in _NUMBER_ENDS:
            return self._break()
        self._end()
        return False  # the character is the next state's

    def _close(self) -> bool:
        self._stack.pop()
        self._end()
        return True

    def _end(self) -> None:
        """A value is complete."""
        self._state = self._after
        self.is_done = not self._stack

    def _break(self) -> bool:
        self.is_broken = True
        return False
