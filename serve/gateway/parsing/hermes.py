"""Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them between content.

The format of NousResearch's Hermes 2 Pro; Qwen2.5 and Qwen3 took it over.
"""

from __future__ import annotations

from collections.abc import Collection

from serve.gateway.parsing.call_object import CallObject
from serve.gateway.parsing.calls import Raw, Section
from serve.gateway.parsing.events import Parsed
from serve.gateway.parsing.json_scanner import SPACES

START, END = "<tool_call>", "</tool_call>"


class HermesSection(Section):
    """One call and its closing tag."""

    def __init__(self, names: Collection[str], end: str) -> None:
        super().__init__()
        self._call = CallObject(names)
        self._end = end
        self._num_end = 0
        """Characters of the closing tag that were read."""

    def _read(self, text: str, at: int, out: list[Parsed]) -> int:
        if not self._call.is_done:
            at = self._call.take(text, at, out)
            self.is_settled, self.is_broken = self._call.has_begun, self._call.is_broken
            if self._call.is_raw:
                self._raw = Raw(self._end)
            return at
        if not self._num_end and text[at] in SPACES:
            return at + 1
        if text[at] != self._end[self._num_end]:
            self.is_broken = True  # no closing tag: whatever it is, it is content
            return at
        self._num_end += 1
        self.is_done = self.is_settled = self._num_end == len(self._end)
        return at + 1
