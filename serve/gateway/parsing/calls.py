"""Content with calls in it: where they begin and end, whatever their format. The formats are beside.

    content … marker │ section: calls │ content …        or, for some formats, a section at the very start

A section that turns out to be no call is content, as it was written. Whitespace beside calls is nobody's: it is held
back, told when content follows and dropped when a call does or the answer ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from serve.gateway.parsing.events import Arguments, CallStart, Content, Parsed
from serve.gateway.parsing.markers import MarkerFinder, Spellings


class Section(ABC):
    """The calls behind one marker. A format says how they are read (`_read`)."""

    def __init__(self) -> None:
        self.is_done = False
        """The section is over; what follows is content again, or the next marker."""
        self.is_broken = False
        """What was read since it was settled last is no call."""
        self.is_settled = False
        """Nothing that was read can become content any more."""
        self._raw: Raw | None = None
        """The arguments stopped being valid: they are told as they were written."""

    def take(self, text: str, at: int, out: list[Parsed]) -> int:
        """Read on from `at`, appending what it says, and stop where any of the above changes."""
        if self._raw is None:
            return self._read(text, at, out)
        at = self._raw.take(text, at, out)
        self.is_done = self._raw.is_done
        return at

    def finish(self, out: list[Parsed]) -> None:
        """The output ended."""
        if self._raw is not None:
            self._raw.finish(out)

    @abstractmethod
    def _read(self, text: str, at: int, out: list[Parsed]) -> int:
        """`take` while the arguments are valid."""


class Raw:
    """The rest of broken arguments, up to a marker that ends the section (None: to the end of the output)."""

    def __init__(self, end: str | None = None) -> None:
        self._finder = MarkerFinder((end,) if end else ())
        self.is_done = False

    def take(self, text: str, at: int, out: list[Parsed]) -> int:
        before, marker, at = self._finder.find(text, at)
        out.append(Arguments(before))
        self.is_done = marker is not None
        return at

    def finish(self, out: list[Parsed]) -> None:
        out.append(Arguments(self._finder.finish()))


class CallParser:
    """An `OutputParser` for answers with calls."""

    is_reasoning = False

    def __init__(
        self, section: Callable[[], Section], spellings: Spellings, *, markers: tuple[str, ...] = (), opener: str = ""
    ) -> None:
        """A section begins behind one of `markers`, and at the start of the answer when that is the character `opener`
        (empty: nowhere)."""
        self._make_section = section
        self._spellings = spellings
        self._openings = frozenset(map(spellings, markers))
        self._finder = MarkerFinder([*self._openings, *spellings.special])
        self._opener = opener
        self._is_at_start = True
        self._section: Section | None = None
        self._unsettled: list[str] = []
        """What the section has read and may have to give back."""
        self._spaces: list[str] = []
        self._has_called = False

    def push(self, text: str) -> list[Parsed]:
        out: list[Parsed] = []
        at = 0
        while at < len(text):
            if self._section is None:
                at = self._in_content(text, at, out)
            else:
                at = self._in_section(self._section, text, at, out)
        return out

    def finish(self) -> list[Parsed]:
        out: list[Parsed] = []
        if self._section is not None:
            self._section.finish(out)
        self._give_back(out)
        self._say(self._finder.finish(), out)
        if self._spaces and not self._has_called:
            out.append(Content("".join(self._spaces)))
        return out

    def _in_content(self, text: str, at: int, out: list[Parsed]) -> int:
        if self._is_at_start and self._opener:
            start = len(text) - len(text[at:].lstrip())
            self._spaces.append(text[at:start])
            if start == len(text):
                return start
            at, self._is_at_start = start, False
            if text[at] == self._opener:
                self._section = self._make_section()
                return at
        before, marker, at = self._finder.find(text, at)
        self._say(before, out)
        if marker in self._openings:
            self._section = self._make_section()
            self._unsettled.append(marker)
        elif marker is not None:
            self._say(marker, out)
        return at

    def _in_section(self, section: Section, text: str, at: int, out: list[Parsed]) -> int:
        start, num_said = at, len(out)
        at = section.take(text, at, out)
        if any(isinstance(event, CallStart) for event in out[num_said:]):
            self._has_called = True
            self._spaces.clear()
        if section.is_settled:
            self._unsettled.clear()
        else:
            self._unsettled.append(text[start:at])
        if section.is_broken:
            self._give_back(out)
        if section.is_done or section.is_broken:
            self._section = None
        return at

    def _give_back(self, out: list[Parsed]) -> None:
        text = "".join(self._unsettled)
        self._unsettled.clear()
        self._say(text, out)

    def _say(self, text: str, out: list[Parsed]) -> None:
        text = self._spellings.visible(text)
        trimmed = text.rstrip()
        if trimmed:
            out.append(Content("".join(self._spaces) + trimmed))
            self._spaces.clear()
        if len(trimmed) < len(text):
            self._spaces.append(text[len(trimmed) :])
