"""Reasoning split from the answer: `<think>…</think>`, written by the model, or opened by its chat template already.

Blank lines beside the tags belong to nobody. Calls are looked for in the answer only.
"""

from __future__ import annotations

from enum import Enum

from serve.gateway.parsing.events import OutputParser, Parsed, Reasoning
from serve.gateway.parsing.markers import MarkerFinder, Spellings

START, END = "<think>", "</think>"


class Stage(Enum):
    """Where in the output the text is."""

    UNKNOWN = "unknown"
    """At its start, where reasoning may be opened."""
    EXPECTED = "expected"
    """At its start, which is reasoning, whether or not the model opens it once more."""
    INSIDE = "inside"
    AFTER = "after"
    """Behind the closing tag, before the answer's first character."""
    ANSWER = "answer"


class ReasoningParser:
    """An `OutputParser` that hands the answer on to the next one."""

    def __init__(self, answer: OutputParser, spellings: Spellings, stage: Stage = Stage.UNKNOWN) -> None:
        self._answer = answer
        self._spellings = spellings
        self._start, self._end = spellings(START), spellings(END)
        self._stage = stage
        self._finder = MarkerFinder((self._end, *spellings.special))
        self._head = ""
        """What may become the opening tag."""
        self._spaces: list[str] = []
        self._has_reasoned = False

    @property
    def is_reasoning(self) -> bool:
        return self._stage in (Stage.EXPECTED, Stage.INSIDE)

    def push(self, text: str) -> list[Parsed]:
        out: list[Parsed] = []
        if self._stage in (Stage.UNKNOWN, Stage.EXPECTED):
            text = self._open(text)
        if self._stage is Stage.INSIDE:
            text = self._inside(text, out)
        if self._stage is Stage.AFTER:
            text = text.lstrip()
            if text:
                self._stage = Stage.ANSWER
        if self._stage is Stage.ANSWER and text:
            out += self._answer.push(text)
        return out

    def finish(self) -> list[Parsed]:
        out: list[Parsed] = []
        if self._stage is Stage.UNKNOWN:
            out += self._answer.push("".join(self._spaces) + self._head)
        elif self.is_reasoning:
            self._think(self._head or self._finder.finish(), out)
        return out + self._answer.finish()

    def _open(self, text: str) -> str:
        """Look for the opening tag at the start. Returns what is to be read on once that is known."""
        if not self._head:
            bare = text.lstrip()
            self._spaces.append(text[: len(text) - len(bare)])
            text = bare
        num = len(self._start) - len(self._head)
        self._head += text[:num]
        if self._head == self._start:
            self._spaces.clear()
            self._head, self._stage = "", Stage.INSIDE
            return text[num:]
        if self._start.startswith(self._head):
            return ""
        head, self._head = "".join(self._spaces) + self._head, ""
        self._spaces.clear()
        self._stage = Stage.INSIDE if self._stage is Stage.EXPECTED else Stage.ANSWER
        return head + text[num:]

    def _inside(self, text: str, out: list[Parsed]) -> str:
        """Read reasoning up to its end. Returns what is left."""
        at = 0
        while at < len(text):
            before, marker, at = self._finder.find(text, at)
            self._think(before, out)
            if marker == self._end:
                self._stage = Stage.AFTER
                return text[at:]
            self._think(self._spellings.visible(marker or ""), out)
        return ""

    def _think(self, text: str, out: list[Parsed]) -> None:
        if not self._has_reasoned:
            text = text.lstrip()
        trimmed = text.rstrip()
        if trimmed:
            self._has_reasoned = True
            out.append(Reasoning("".join(self._spaces) + trimmed))
            self._spaces.clear()
        if len(trimmed) < len(text):
            self._spaces.append(text[len(trimmed) :])
