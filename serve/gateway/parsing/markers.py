"""Markers in a stream of text: the strings models write around their calls and their reasoning.

A marker may be a special token of the model (`[TOOL_CALLS]`), which texts usually leave out. The parser must see it and
the client must not, and characters that only look like it are no marker. So the detokeniser spells such a token with
`SPECIAL` in front, and here that is the marker's spelling.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

SPECIAL = "\0"
"""No token's text begins with it. A model that writes NUL and then the characters of a marker fools itself only."""


class Spellings:
    """How one model's markers are spelled in the text that reaches a parser."""

    def __init__(self, special: Collection[str] = (), *, hides: bool = True) -> None:
        """`special`: markers that are special tokens; with `hides` they never reach the client."""
        self._hidden = {SPECIAL + marker: "" if hides else marker for marker in special}

    def __call__(self, marker: str) -> str:
        spelled = SPECIAL + marker
        return spelled if spelled in self._hidden else marker

    @property
    def special(self) -> tuple[str, ...]:
        """The spellings of the special ones."""
        return tuple(self._hidden)

    def visible(self, text: str) -> str:
        """`text` as the client may see it."""
        if SPECIAL in text:
            for spelled, shown in self._hidden.items():
                text = text.replace(spelled, shown)
        return text


class MarkerFinder:
    """Finds the next of some markers in text that comes in pieces. Every character is looked at a bounded number of
    times; held back is only what may be the beginning of a marker."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(dict.fromkeys(markers))
        self._longest = max(map(len, self._markers), default=0)
        self._pattern = re.compile("|".join(map(re.escape, self._markers)) or r"(?!)")
        self._held = ""

    def find(self, text: str, at: int) -> tuple[str, str | None, int]:
        """Read `text` from `at`: what stands before the next marker, the marker (None: not yet), where to go on."""
        before = ""
        if self._held:
            head = self._held + text[at : at + self._longest]
            found = self._pattern.search(head)
            if found is not None and found.start() < len(self._held):
                at += found.end() - len(self._held)
                self._held = ""
                return head[: found.start()], found[0], at
            if at + self._longest > len(text):  # the head ends with the text
                keep = self._start_of_partial(head, 0)
                if keep < len(self._held):
                    self._held = head[keep:]
                    return head[:keep], None, len(text)
            before, self._held = self._held, ""
        found = self._pattern.search(text, at)
        if found is not None:
            return before + text[at : found.start()], found[0], found.end()
        keep = self._start_of_partial(text, at)
        self._held = text[keep:]
        return before + text[at:keep], None, len(text)

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _start_of_partial(self, text: str, at: int) -> int:
        """Where the longest end of `text` begins that could become a marker."""
        for start in range(max(at, len(text) - self._longest + 1), len(text)):
            if any(marker.startswith(text[start:]) for marker in self._markers):
                return start
        return len(text)
