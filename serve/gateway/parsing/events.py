"""What an answer's text turns out to be, and the protocol of the parsers that find out.

A parser reads text as it is generated, in pieces cut anywhere, and says the same whatever the cuts are. It is linear in
the text, holds back only what may still become something else, and evaluates nothing. A call is a call from the moment
its name is one of the offered tools and its arguments begin: until then the text can still become content, from then on
it has been told and stays a call. So what was never a call is content, as it was written; arguments that stop being
valid are told as they were written, as OpenAI's API does, and whoever runs the tool sees that they do not parse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote to itself before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of an offered tool begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the current call's arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The current call is complete: its arguments are a JSON object. A call that was cut off has none."""


Parsed = Content | Reasoning | CallStart | Arguments | CallEnd


class OutputParser(Protocol):
    """Of one choice."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends inside the model's reasoning."""
        ...

    def push(self, text: str) -> list[Parsed]:
        """What `text` adds."""
        ...

    def finish(self) -> list[Parsed]:
        """What was held back: the output ended."""
        ...


def merged(events: Iterable[Parsed]) -> list[Parsed]:
    """The same with neighbours of one kind joined: independent of how the text was cut."""
    joined: list[Parsed] = []
    for _, run in groupby(events, type):
        first, *rest = run
        if isinstance(first, CallStart | CallEnd):
            joined += [first, *rest]
        elif text := "".join([first.text, *(event.text for event in rest if isinstance(event, type(first)))]):
            joined.append(replace(first, text=text))
    return joined
