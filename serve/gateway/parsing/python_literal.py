"""A Python literal becomes JSON text as it is generated: one look at each character, nothing evaluated.

Strings without prefix or triple quotes, numbers, True, False, None (and JSON's true, false, null), lists, and dicts
with string keys, to a bounded depth: what models write as arguments. Anything else breaks off at that character.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from serve.gateway.parsing.json_scanner import MAX_DEPTH, SPACES

MAX_WORD_CHARS = 512
"""Of a number."""
_PLAIN = re.compile(r"""[^'"\\\x00-\x1f]*""")
_WORD_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
_NAMES = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(r"([+-]?)([0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_ESCAPES = {
    "n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "a": "\\u0007", "v": "\\u000b", "\\": "\\\\",
    "'": "'", '"': '\\"', "\n": "",
}  # fmt: skip
_CONTROLS = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


class PythonLiteral:
    """One value, from its first character on."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._state: Callable[[str], str | None] = self._value
        self._stack: list[str] = []
        """The closing brackets to come."""
        self._quote = ""
        self._is_key = False
        self._word = ""
        self._is_word_over = False
        self._hex = ""
        self._num_hex = 0
        self._comma = ""

    def take(self, text: str, at: int, out: list[str]) -> int:
        """Read from `at` to the value's end at most, appending JSON to `out`. Returns where it stopped reading: the
        character there is not part of the value (done) or cannot be (broken)."""
        while at < len(text) and not self.is_done and not self.is_broken:
            if self._state == self._string:
                plain = _PLAIN.match(text, at)
                if plain and plain.end() > at:
                    out.append(plain[0])
                    at = plain.end()
                    continue
            said = self._state(text[at])
            if said is None:
                self.is_broken = True
                out.append(self._comma + self._word)
            else:
                out.append(said)
                if self._is_word_over:
                    self._is_word_over = False  # the character is the next state's
                else:
                    at += 1
        return at

    def _value(self, char: str) -> str | None:
        if char in SPACES:
            return ""
        comma, self._comma = self._comma, ""
        if char in "'\"":
            self._quote, self._is_key, self._state = char, False, self._string
            return comma + '"'
        if char in "[{":
            if len(self._stack) == MAX_DEPTH:
                return None
            self._stack.append("]" if char == "[" else "}")
            self._state = self._first_item if char == "[" else self._first_key
            return comma + char
        if char not in _WORD_CHARS:
            return None
        self._word, self._state = char, self._in_word
        return comma

    def _first_item(self, char: str) -> str | None:
        return self._close() if char == "]" else self._value(char)

    def _first_key(self, char: str) -> str | None:
        if char in SPACES:
            return ""
        if char == "}":
            return self._close()
        if char not in "'\"":
            return None
        comma, self._comma = self._comma, ""
        self._quote, self._is_key, self._state = char, True, self._string
        return comma + '"'

    def _colon(self, char: str) -> str | None:
        if char == ":":
            self._state = self._value
            return ": "
        return "" if char in SPACES else None

    def _after(self, char: str) -> str | None:
        if char == ",":
            self._comma = ", "  # written with the next value: Python allows a comma behind the last
            self._state = self._first_key if self._stack[-1] == "}" else self._first_item
            return ""
        if char == self._stack[-1]:
            return self._close()
        return "" if char in SPACES else None

    def _string(self, char: str) -> str | None:
        """At a quote, a backslash or a control character."""
        if char == "\\":
            self._state = self._escape
            return ""
        if char != self._quote:
            return '\\"' if char == '"' else _CONTROLS.get(char, f"\\u{ord(char):04x}" if char < " " else char)
        if self._is_key:
            self._state = self._colon
        else:
            self._end()
        return '"'

    def _escape(self, char: str) -> str | None:
        self._state = self._string
        if char in _HEX_DIGITS:
            self._hex, self._num_hex, self._state = "", _HEX_DIGITS[char], self._in_hex
            return ""
        if char in "01234567N":  # octal, and names of characters
            return None
        known = _ESCAPES.get(char)
        if known is not None:
            return known
        return "\\\\" + (char if char >= " " else f"\\u{ord(char):04x}")  # Python leaves such a backslash in the text

    def _in_hex(self, char: str) -> str | None:
        if char not in "0123456789abcdefABCDEF":
            return None
        self._hex += char
        if len(self._hex) < self._num_hex:
            return ""
        code = int(self._hex, 16)
        if code > 0x10FFFF:
            return None
        self._state = self._string
        if code <= 0xFFFF:
            return f"\\u{code:04x}"
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"

    def _in_word(self, char: str) -> str | None:
        if char in _WORD_CHARS:
            if len(self._word) == MAX_WORD_CHARS:
                return None
            self._word += char
            return ""
        said = _NAMES.get(self._word) or _number(self._word)
        if said is not None:
            self._end()
            self._word, self._is_word_over = "", True
        return said

    def _close(self) -> str:
        self._comma = ""
        closer = self._stack.pop()
        self._end()
        return closer

    def _end(self) -> None:
        """A value is complete."""
        self._state = self._after
        self.is_done = not self._stack


def _number(word: str) -> str | None:
    """A Python number as JSON writes it: no plus, no bare point, no leading zeros."""
    match = _NUMBER.fullmatch(word)
    if match is None:
        return None
    sign, whole, fraction, exponent = (part or "" for part in match.groups())
    digits = fraction[1:]
    if (not whole and not digits) or (len(whole) > 1 and whole[0] == "0" and not fraction and not exponent):
        return None
    whole = whole.lstrip("0") or "0"
    return ("-" if sign == "-" else "") + whole + (f".{digits or '0'}" if fraction else "") + exponent
