"""Mistral: calls behind `[TOOL_CALLS]`, as a JSON list or, since version 11 of its tokenizer, as name and arguments.

[TOOL_CALLS][{"name": "f", "arguments": {…}, "id": "…"}, …]
[TOOL_CALLS]f[ARGS]{…}[TOOL_CALLS]g[CALL_ID]…[ARGS]{…}
"""

from __future__ import annotations

from collections.abc import Collection

from serve.gateway.parsing.calls import Raw, Section
from serve.gateway.parsing.events import Arguments, CallEnd, CallStart, Parsed
from serve.gateway.parsing.json_calls import JsonSection
from serve.gateway.parsing.json_scanner import SPACES, JsonScanner
from serve.gateway.parsing.markers import MarkerFinder, Spellings

START, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_MAX_HEAD_CHARS = 256
"""Name and id of a call."""


class MistralSection(Section):
    """What stands behind one `[TOOL_CALLS]`."""

    def __init__(self, names: Collection[str], spellings: Spellings) -> None:
        super().__init__()
        self._names = names
        self._spellings = spellings
        self._inner: Section | None = None

    def _read(self, text: str, at: int, out: list[Parsed]) -> int:
        if self._inner is None:
            if text[at] in SPACES:
                return at + 1
            is_json = text[at] in "[{"
            self._inner = (
                JsonSection(self._names, is_list=text[at] == "[")
                if is_json
                else NamedSection(self._names, self._spellings)
            )
        at = self._inner.take(text, at, out)
        self.is_done, self.is_broken = self._inner.is_done, self._inner.is_broken
        self.is_settled = self._inner.is_settled
        return at


class NamedSection(Section):
    """`f[ARGS]{…}`, from the name on."""

    def __init__(self, names: Collection[str], spellings: Spellings) -> None:
        super().__init__()
        self._names = names
        self._args, self._call_id = spellings(ARGS), spellings(CALL_ID)
        self._finder = MarkerFinder((self._args, self._call_id, "{"))
        self._head: list[str] = []
        self._num_head = 0
        self._name = ""
        self._has_args = False
        self._scanner: JsonScanner | None = None

    def _read(self, text: str, at: int, out: list[Parsed]) -> int:
        if self._scanner is not None:
            parts: list[str] = []
            at = self._scanner.take(text, at, parts)
            out.append(Arguments("".join(parts)))
            if self._scanner.is_done:
                out.append(CallEnd())
                self.is_done = True
            elif self._scanner.is_broken:
                self._raw = Raw()
            return at
        if self._has_args:
            if text[at] == "{":
                self._begin(out)
                return at
            self.is_broken = text[at] not in SPACES
            return at + (not self.is_broken)
        return self._read_head(text, at, out)

    def _read_head(self, text: str, at: int, out: list[Parsed]) -> int:
        before, marker, at = self._finder.find(text, at)
        self._head.append(before)
        self._num_head += len(before)
        if self._num_head > _MAX_HEAD_CHARS:
            self.is_broken = True
        elif marker is not None:
            if not self._name:
                self._name = "".join(self._head).strip()
            if self._name not in self._names:
                self.is_broken = True
            elif marker == self._args:
                self._has_args = True
            elif marker == "{":
                self._begin(out)
                return at - 1
        return at

    def _begin(self, out: list[Parsed]) -> None:
        self.is_settled = True
        self._scanner = JsonScanner()
        out.append(CallStart(self._name))
